# SPDX-License-Identifier: Apache-2.0
"""How sure a mean is: intervals by drawing records again, in each subset by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

DRAWS = 10_000
_AT_ONCE = 2**21  # numbers drawn at a time


def interval(
    subsets: Sequence[Sequence[float]], *, seed: int, draws: int = DRAWS, level: float = 0.95
) -> tuple[float, float]:
    """Bounds of the mean of the subsets' means.

    Args:
        subsets: values of each subset's records, none empty; for a paired comparison their differences.
        seed: of the draws. draws: how many. level: share of the draws between the bounds.
    Returns:
        (low, high), percentiles of the drawn means. Cost: draws x records numbers.
    Raises:
        ValueError: no subset, or an empty one.
    """
    if not subsets or not all(subsets):
        raise ValueError("uncomp.eval: interval needs subsets with at least one record each")
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(draws, dtype=torch.float64)
    for values in subsets:
        value = torch.tensor(list(values), dtype=torch.float64)
        if bool((value == value[0]).all()):
            means += value[0]
            continue
        step = max(1, _AT_ONCE // value.numel())
        for start in range(0, draws, step):
            size = (min(step, draws - start), value.numel())
            means[start : start + size[0]] += value[torch.randint(value.numel(), size, generator=generator)].mean(1)
    means /= len(subsets)
    edge = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return low, high
