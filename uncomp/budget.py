# SPDX-License-Identifier: Apache-2.0
"""Takes a budget, a shape over the groups and a shape over the layers.

Gives whole tokens: the mean of a layer, the weight of a group, the limit of a row; totals exact.
Formula: limits proportional to s_g = 1 - x + 2 x g / (G - 1), clamped, summing to rows * mean.
docs/method.md "Budget".
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor as whole
from math import gcd, lcm

import torch
from torch import Tensor

from uncomp import ops
from uncomp.grouping import group_sizes, int32_on

MAX_WEIGHT = 1 << 20  # largest weight that allocate_budget takes; kMaxBudgetWeight of csrc/core/constants.h
LAYER_SHAPES = ("uniform", "pyramid")


def exact(number: int | float | Fraction) -> Fraction:
    """A number as a fraction; a float counts as the decimal it prints as, so 0.1 is a tenth."""
    return Fraction(str(number)) if isinstance(number, float) else Fraction(number)


def share_out(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole parts of shares that sum to `total`, and one more for the largest fractions, ties to the lower index."""
    parts = [whole(share) for share in shares]
    by_fraction = sorted(range(len(parts)), key=lambda i: (parts[i] - shares[i], i))
    for i in by_fraction[: total - sum(parts)]:
        parts[i] += 1
    return parts


def mean_tokens(budget: int | float, n: int, floor: int) -> int:
    """Mean tokens of a row.

    Args:
        budget: an int is tokens; a float in (0, 1] is the share of the n prompt tokens, rounded half up.
        n: real tokens of the prompt.
        floor: tokens every row keeps in any case: window and sinks.
    Returns:
        Tokens, at least `floor`: a share is raised to it.
    Raises:
        TypeError: budget neither int nor float.
        ValueError: an int below `floor`, or a float outside (0, 1].
    Source: docs/method.md "Budget".
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float, Fraction)):
        raise TypeError(f"uncomp.budget: budget must be an int (tokens) or a float (share); got {budget!r}")
    if isinstance(budget, int):
        if budget < floor:
            raise ValueError(f"uncomp.budget: budget must be at least window + sinks = {floor} tokens; got {budget}")
        return budget
    if not 0 < budget <= 1:
        raise ValueError(f"uncomp.budget: a budget given as a share must lie in (0, 1]; got {budget}")
    return max(floor, whole(exact(budget) * n + Fraction(1, 2)))


def integer_weights(weights: Sequence[int | float | Fraction]) -> list[int]:
    """Weights as integers of the same proportions, without common factor.

    Raises:
        ValueError: no weight, one that is not positive, or an integer above 2^20, which allocate_budget does not take.
    """
    fractions = [exact(w) for w in weights]
    if not fractions or min(fractions) <= 0:
        raise ValueError(f"uncomp.budget: weights must be positive; got {list(map(str, weights))}")
    scale = lcm(*(f.denominator for f in fractions))
    integers = [int(f * scale) for f in fractions]
    common = gcd(*integers)
    integers = [w // common for w in integers]
    if max(integers) > MAX_WEIGHT:
        raise ValueError(
            f"uncomp.budget: weights in lowest terms must not pass {MAX_WEIGHT}; got {max(integers)}: "
            "use numbers with fewer digits"
        )
    return integers


def group_weights(num_groups: int, spread: int | float | Fraction | None = None) -> list[int]:
    """Weights of the linear shape, lowest entropy first: 1 - x + 2 x g / (G - 1) in lowest integers.

    Args:
        num_groups: G, at least 1; one group weighs 1.
        spread: x in [0, 1); default 1/3 for two groups, else 2/3. A float counts as its decimal.
    Returns:
        G positive integers without common factor.
    Raises:
        ValueError: G below 1, x outside [0, 1), or an x of so many digits that a weight passes 2^20.
    Source: docs/method.md "Budget".
    """
    if num_groups < 1:
        raise ValueError(f"uncomp.budget: num_groups must be at least 1; got {num_groups}")
    default = Fraction(1, 3) if num_groups == 2 else Fraction(2, 3)
    if spread is not None and not 0 <= spread < 1:
        raise ValueError(f"uncomp.budget: spread must lie in [0, 1); got {spread}")
    x = default if spread is None else exact(spread)
    if num_groups == 1:
        return [1]
    return integer_weights([1 - x + 2 * x * group / (num_groups - 1) for group in range(num_groups)])


def entropy_weights(entropy: Tensor, spread: int | float | Fraction | None = None) -> Tensor:
    """Weights that follow the entropies themselves instead of groups of them: a group for every rank. No host sync.

        s_h = E_h / max E                                        without a spread
        s_h = 1 - x + 2 x (E_h - min E) / (max E - min E)        with spread x; 1 where all are equal

    Args:
        entropy: [N, H] float32 statistic of the rows, at least 0; NaN counts as the largest of its sequence.
        spread: x in [0, 1).
    Returns:
        [N, H] int32 on the same device, ascending: the weight of each rank, from 1 to 2^20.
    Raises:
        ValueError: x outside [0, 1).
    Source: docs/method.md "Budget".
    """
    if spread is not None and not 0 <= spread < 1:
        raise ValueError(f"uncomp.budget: spread must lie in [0, 1); got {spread}")
    known = ~entropy.isnan()
    value = entropy.double().clamp(min=0.0)
    most = value.masked_fill(~known, 0.0).amax(1, keepdim=True)
    value = torch.where(known, value, most).sort(dim=1).values
    if spread is None:
        share = value / most
    else:
        least = value[:, :1]
        share = (1 - float(spread) + 2 * float(spread) * (value - least) / (most - least)) / (1 + float(spread))
    share = torch.nan_to_num(share, nan=1.0)  # all equal, or all zero: 0 / 0
    return (share * MAX_WEIGHT).round().clamp(1, MAX_WEIGHT).to(torch.int32)


def extreme_weights(low: int, mean: int, rows: int, floor: int) -> list[int]:
    """Weights of two groups of which the low one gets exactly `low` tokens a row and the high one the rest.

    With groups of one size the high limit is 2 mean - low. Rows are cut as in group_sizes(rows, 2).

    Args:
        low: limit of the low group, tokens; at least `floor`, at most `mean`.
        mean: mean tokens of a row; the rows share rows * mean.
        rows: rows of the plan, at least 2.
        floor: window and sinks, tokens.
    Returns:
        [low weight, high weight], integers without common factor.
    Raises:
        ValueError: low outside [floor, mean], fewer than two rows, or a weight above 2^20.
    Source: docs/method.md "Budget".
    """
    if not floor <= low <= mean:
        raise ValueError(
            f"uncomp.budget: extreme must lie between window + sinks = {floor} and the mean of {mean} tokens; got {low}"
        )
    low_rows, high_rows = group_sizes(rows, 2)
    return integer_weights([low, Fraction(rows * mean - low_rows * low, high_rows)])


def layer_means(
    b: int, n: int, num_layers: int, layer_shape: str, floor: int, beta: int | float | Fraction = 20
) -> list[int]:
    """Mean tokens of a row in every layer; they sum to num_layers * b.

    Args:
        b: mean tokens over the layers, at least `floor`.
        n: prompt tokens.
        num_layers: L, at least 1.
        layer_shape: "uniform" gives b everywhere; "pyramid" falls linearly, the first layers keep most.
        floor: window and sinks, tokens; lies outside the pyramid.
        beta: how steep: the last layer keeps (b - floor) / beta above the floor. At least 1.
    Returns:
        L integers, each at least `floor`.
    Raises:
        ValueError: b below `floor`, no layer, beta below 1, or an unknown shape.
    Source: docs/method.md "Budget".
    """
    if b < floor:
        raise ValueError(f"uncomp.budget: b must be at least window + sinks = {floor} tokens; got {b}")
    if num_layers < 1:
        raise ValueError(f"uncomp.budget: num_layers must be at least 1; got {num_layers}")
    if layer_shape not in LAYER_SHAPES:
        raise ValueError(f"uncomp.budget: layer_shape must be one of {', '.join(LAYER_SHAPES)}; got {layer_shape!r}")
    if not beta >= 1:
        raise ValueError(f"uncomp.budget: beta must be at least 1; got {beta}")
    if layer_shape == "uniform" or num_layers == 1:
        return [b] * num_layers
    spare = b - floor
    last = spare / exact(beta)
    first = 2 * spare - last
    if first >= n - floor:
        # A prompt shorter than the floor leaves nothing to share out; the floor itself stays.
        first = Fraction(max(n - floor, 0))
        last = 2 * spare - first
    step = (first - last) / (num_layers - 1)
    return share_out([floor + first - step * layer for layer in range(num_layers)], num_layers * b)


def _int32(value: Tensor | int | Sequence[int], count: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, int):
        return torch.full((count,), value, dtype=torch.int32, device=device)
    values = tuple(value)
    if values and values == values[:1] * count:
        return torch.full((count,), values[0], dtype=torch.int32, device=device)
    return int32_on(device, values)


def limits(
    group: Tensor,
    weights: Tensor | Sequence[int],
    lengths: Tensor | int | Sequence[int],
    totals: Tensor | int | Sequence[int],
    floor: int,
) -> Tensor:
    """Token limit of every row through ops.allocate_budget; the limits of a sequence sum to its total.

    Nothing waits for the device, but for N unequal host numbers, which are copied there once and remembered.

    Args:
        group: [N, H] int32 group of each row.
        weights: G integers (group_weights, a preset), or [G] or [N, G] int32 on the device of `group`.
        lengths: tokens that reach the layer: one number for all, N numbers, or [N] int32 on the device of `group`.
        totals: tokens that the H rows share: likewise; at least H * floor.
        floor: window and sinks, tokens.
    Returns:
        [N, H] int32 limits, tokens.
    Raises:
        TypeError, ValueError: as ops.allocate_budget; for host numbers on every device: weights outside 1 .. 2^20,
            totals below H * floor.
    Source: docs/method.md "Budget".
    """
    count, rows = group.shape
    if not isinstance(weights, Tensor) and not all(1 <= w <= MAX_WEIGHT for w in weights):
        raise ValueError(f"uncomp.budget: weights must lie in [1, {MAX_WEIGHT}]; got {list(weights)}")
    if not isinstance(totals, Tensor):
        least = totals if isinstance(totals, int) else min(totals, default=rows * floor)
        if least < rows * floor:
            raise ValueError(f"uncomp.budget: totals must be at least rows * floor = {rows * floor}; got {least}")
    weights = weights if isinstance(weights, Tensor) else int32_on(group.device, tuple(weights))
    lengths, totals = _int32(lengths, count, group.device), _int32(totals, count, group.device)
    return ops.allocate_budget(group, weights, lengths, totals, floor)


def clipped_shares(weight: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Shares in proportion to weights, none above its bound, that sum to the totals exactly. No host sync.

    Rows whose share passes their bound get the bound, the others share what is left; whole parts, then one more for the
    largest fractions, ties to the lower row. Where all bounds together are less than the total every row gets its
    bound, and the rest is spread evenly.

    Args:
        weight: [N, H] int64, at least 0; weight * total must stay below 2^63, as must most * the sum of a row.
        most: [N, H] int64 bounds, at least 0. A weight of 0 gets nothing, so the others must hold the total.
        total: [N, 1] int64, at least 0.
    Returns:
        [N, H] int64.
    Source: docs/policies.md "adakv".
    """
    rows = weight.shape[1]
    room = most.sum(1, keepdim=True)
    over = (total - room).clamp(min=0)
    left = total - over
    # In ascending order of bound / weight the rows that reach their bound stand in front.
    order = torch.where(weight > 0, most.double() / weight, float("inf")).argsort(stable=True, dim=1)
    bound, share = most.gather(1, order), weight.gather(1, order)
    before = bound.cumsum(1) - bound
    after = share.sum(1, keepdim=True) - share.cumsum(1) + share
    reaches = (bound * after <= (left - before) * share) & ((share > 0) | (bound == 0))
    full = torch.zeros_like(reaches).scatter_(1, order, reaches.long().cumprod(1).bool())
    left = left - most.masked_fill(~full, 0).sum(1, keepdim=True)
    free = weight.masked_fill(full, 0)
    whole_weight = free.sum(1, keepdim=True).clamp(min=1)
    part = torch.div(left * free, whole_weight, rounding_mode="floor")
    fraction = (left * free - part * whole_weight).masked_fill(full | (weight == 0), -1)
    missing = left - part.sum(1, keepdim=True)
    rank = fraction.argsort(stable=True, dim=1, descending=True).argsort(1)
    part = torch.where(full, most, part + (rank < missing))
    each = torch.div(over, rows, rounding_mode="floor")
    return part + each + (torch.arange(rows, device=weight.device) < over - each * rows)
