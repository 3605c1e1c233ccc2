# SPDX-License-Identifier: Apache-2.0
"""allocate_budget: one layer's rows, a batch of them, and the rows of a whole model."""

import torch
from harness import Case
from rivals import compiled

from uncomp import ops


def eager_share(group, weight, length, total):
    """One round of sharing in float64 with the same rounding; freezing at the bounds would cost more rounds."""
    weights = weight[group.long()].double()
    share = weights * (total / weights.sum(1)).unsqueeze(1)
    share = torch.minimum(share.clamp_min(8), length.unsqueeze(1).double())
    limit = share.floor()
    missing = total - limit.sum(1)
    rank = (limit - share).argsort(dim=1, stable=True).argsort(1)
    return (limit + (rank < missing.unsqueeze(1))).int()


def case(count, rows, num_groups, mean, length, ranked=False):
    """`ranked`: the groups are found from entropies by group_heads, in the same graph."""

    def tensors(i):
        generator = torch.Generator("cuda").manual_seed(i)
        options = {"device": "cuda", "dtype": torch.int32}
        group = torch.randint(0, num_groups, (count, rows), generator=generator, **options)
        weight = torch.arange(num_groups, **options) * 4 + num_groups - 1
        return group, weight, torch.full((count,), length, **options), torch.full((count,), rows * mean, **options)

    def ours(i):
        args = tensors(i)
        if not ranked:
            return lambda: ops.allocate_budget(*args, 8)
        entropy = torch.rand(count, rows, device="cuda", generator=torch.Generator("cuda").manual_seed(i))
        return lambda: ops.allocate_budget(ops.group_heads(entropy, num_groups)[0], *args[1:], 8)

    def eager(i):
        group, *args = tensors(i)
        entropy = torch.rand(count, rows, device="cuda", generator=torch.Generator("cuda").manual_seed(i))
        ids = torch.arange(rows, device="cuda") * num_groups // rows

        def rank_and_share():
            ranks = entropy.argsort(dim=1, stable=True).argsort(1)
            return eager_share(ids[ranks], *args)

        return rank_and_share if ranked else lambda: eager_share(group, *args)

    moved = count * (rows * (4 + 4) + 8) + 4 * num_groups
    shape = f"{count}x{rows} rows, {num_groups} groups" + (", with group_heads" if ranked else "")
    rivals = {"torch eager": eager, "torch.compile": compiled(eager)}
    return Case("allocate_budget", shape, "int32", moved, ours, rivals)


def cases() -> list[Case]:
    return [
        case(1, 32, 2, 384, 32768),
        case(1, 32, 2, 384, 32768, ranked=True),
        case(1, 32, 8, 384, 600),
        case(256, 8, 2, 384, 4096),
        case(1, 1024, 32, 384, 600),
    ]
