# SPDX-License-Identifier: Apache-2.0
"""group_heads by a sort of Python tuples; sizes by dealing out the leftover rows one at a time."""

import math


def group_sizes(rows, num_groups):
    sizes = [rows // num_groups] * num_groups
    outer = [end for i in range(num_groups) for end in (num_groups - 1 - i, i)]
    for group in outer[: rows % num_groups]:
        sizes[group] += 1
    return sizes


def group_heads(entropy, num_groups, order="ascending"):
    """Lists group [N][H] and rank [N][H] of a tensor [N, H]."""
    groups, ranks = [], []
    for values in entropy.tolist():
        keys = [(math.isnan(x), 0.0 if math.isnan(x) else x, i) for i, x in enumerate(values)]
        rank = [0] * len(keys)
        for place, (_, _, row) in enumerate(sorted(keys)):
            rank[row] = place
        ids = [g for g, size in enumerate(group_sizes(len(keys), num_groups)) for _ in range(size)]
        if order == "reverse":
            ids = [num_groups - 1 - g for g in ids]
        groups.append([ids[place] for place in rank])
        ranks.append(rank)
    return groups, ranks
