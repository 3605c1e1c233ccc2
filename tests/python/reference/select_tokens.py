# SPDX-License-Identifier: Apache-2.0
"""select_tokens, one row and one token at a time. Averages are fp32 sums in ascending order, as the contract says."""

import math

import numpy as np


def pooled(scores, end, pool, mode):
    """Pooled scores of columns [0, end); NaN is written as None."""
    half, result = pool // 2, []
    with np.errstate(all="ignore"):
        for j in range(end):
            near = scores[max(j - half, 0) : min(j + half + 1, end)]
            if mode == "max":
                numbers = [float(x) for x in near if not math.isnan(x)]
                result.append(max(numbers) if numbers else None)
            else:
                mean = np.float32(0)
                for x in near:
                    mean = np.float32(mean + x)
                mean = float(np.float32(mean / np.float32(pool)))
                result.append(None if math.isnan(mean) else mean)
    return result


def select_row(scores, length, keep, sink, window, pool, mode):
    """Kept columns of one row, ascending."""
    n = min(max(length, 0), len(scores))
    keep = min(max(keep, min(sink + window, n)), n)
    if keep == n:
        return list(range(n))
    end = n - window
    values = pooled(scores, end, pool, mode)
    best = sorted(range(sink, end), key=lambda j: (values[j] is None, 0.0 if values[j] is None else -values[j], j))
    chosen = best[: keep - sink - window]
    return sorted([*range(sink), *chosen, *range(end, n)])


def select_tokens(scores, length, keep_len, total_keep, *, sink, window, pool=1, pool_mode="max"):
    """Lists index [total_keep] and row_start [R + 1]."""
    index, row_start = [], [0]
    for row, n, keep in zip(scores.cpu().numpy(), length.tolist(), keep_len.tolist(), strict=True):
        index += select_row(row, n, keep, sink, window, pool, pool_mode)
        row_start.append(len(index))
    index = index[:total_keep] + [-1] * (total_keep - len(index))
    return index, [min(start, total_keep) for start in row_start]
