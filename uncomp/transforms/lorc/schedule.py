# SPDX-License-Identifier: Apache-2.0
"""How many channels each layer keeps.

Takes: log condition numbers of the layers' key and value projections. Gives: one rank a layer for keys and one for
values, whose mean is exactly the share that was asked for, up to one step of 16 channels over the whole model.
Formula: d_l = d_min + t_l (d_max - d_min), t_l from the sums of log condition numbers from layer l to the last.
Source: docs/policies.md "LoRC".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from uncomp.transforms.lorc.config import STEP, LorcConfig, given_ranks


@dataclass(frozen=True)
class Ranks:
    """Ranks of the compressible layers; None where a layer is left as it is."""

    key: tuple[int | None, ...]
    value: tuple[int | None, ...]


def rank_schedule(log_kappa: Sequence[float], head_dim: int, config: LorcConfig) -> Ranks:
    """Ranks of all layers.

    Args:
        log_kappa: [L] natural log of the condition number of each layer's key matrix plus that of its value matrix.
        head_dim: D, channels; a multiple of 16.
        config: schedule and shares.
    Raises:
        ValueError: a head dim that is no multiple of 16, shares that leave a layer no channel, ranks that do not fit.
    """
    if head_dim % STEP:
        raise ValueError(f"uncomp.lorc: head_dim must be a multiple of {STEP}; got {head_dim}")
    count = len(log_kappa)
    cumulative = suffix_sums(log_kappa)
    top = math.inf if config.threshold is None else config.threshold
    cut = [i for i in range(count) if cumulative[i] - cumulative[-1] <= top]  # the last layer always is
    depth = progress([cumulative[i] for i in cut], config.schedule)
    sides = []
    given = (("rank_k", config.rank_k), ("rank_v", config.rank_v))
    for (name, fixed), share in zip(given, config.shares, strict=True):
        if fixed is not None:
            chosen = [given_ranks(name, fixed, count, head_dim)[i] for i in cut]
        else:
            chosen = scheduled(depth, head_dim, share, 0.0 if config.schedule == "uniform" else config.d_min_frac)
        ranks: list[int | None] = [None] * count
        for i, rank in zip(cut, chosen, strict=True):
            ranks[i] = rank
        sides.append(tuple(ranks))
    return Ranks(*sides)


def suffix_sums(values: Sequence[float]) -> list[float]:
    """[L], sum of each value and all that follow."""
    sums, total = [], 0.0
    for value in reversed(values):
        total += value
        sums.append(total)
    return sums[::-1]


def progress(cumulative: Sequence[float], schedule: str) -> list[float]:
    """[L] place of each layer between the smallest rank (0) and the largest (1)."""
    count = len(cumulative)
    if schedule == "uniform" or count == 1:
        return [1.0] * count
    if schedule == "linear":
        return [1 - i / (count - 1) for i in range(count)]
    low, high = min(cumulative), max(cumulative)
    return [1.0 if high == low else (value - low) / (high - low) for value in cumulative]


def scheduled(depth: Sequence[float], head_dim: int, share: float, d_min_frac: float) -> list[int]:
    """Ranks of the layers at `depth` (see progress), mean `share` of the head dim.

    The largest rank follows from the smallest and the mean; where it would exceed the head dim the smallest rises.

    Raises:
        ValueError: fewer than 16 channels for a layer.
    """
    lowest = max(d_min_frac * head_dim, STEP)
    if share * head_dim < lowest - 1e-9:
        raise ValueError(
            f"uncomp.LorcConfig: rho must be at least {lowest / head_dim:g} for heads of {head_dim} channels, so that "
            f"the smallest layer keeps {lowest:g}; got {share:g}"
        )
    mean = sum(depth) / len(depth)
    highest = lowest + (share * head_dim - lowest) / mean
    if highest > head_dim:
        highest = head_dim
        lowest = head_dim if mean == 1 else head_dim * (share - mean) / (1 - mean)
    return rounded([lowest + t * (highest - lowest) for t in depth], head_dim, share)


def rounded(wanted: Sequence[float], head_dim: int, share: float) -> list[int]:
    """Multiples of 16 nearest to `wanted` whose sum is 16 round(share D L / 16); leftovers go to the largest
    remainders, ties to the lower layer."""
    total = math.floor(Fraction(str(share)) * head_dim * len(wanted) / STEP + Fraction(1, 2))
    units = [min(max(math.floor(w / STEP + 1e-9), 1), head_dim // STEP) for w in wanted]
    left = total - sum(units)
    order = sorted(range(len(wanted)), key=lambda i: (-round(wanted[i] / STEP - units[i], 9), i))
    for i in [i for i in order if units[i] < head_dim // STEP][: max(left, 0)]:
        units[i] += 1
    return [STEP * u for u in units]
