# SPDX-License-Identifier: Apache-2.0
"""allocate_budget in fractions: lambda is found between the points where a row meets a bound, not by freezing."""

from bisect import bisect_left
from fractions import Fraction
from math import floor as whole


def allocate(weights, length, total, floor):
    """Limits of the rows of one sequence from the weight of each row."""
    rows = len(weights)
    if length * rows > total:
        low, high = floor, length
    else:
        low, high = max(floor, length), total
    if rows * low > total:
        raise ValueError("total does not hold the lower bounds")

    def clamped(scale):
        return [min(max(scale * w, Fraction(low)), Fraction(high)) for w in weights]

    # The sum is piecewise linear in lambda and rises; its corners are where a row meets a bound.
    corners = sorted({Fraction(bound, w) for w in weights for bound in (low, high)})
    place = bisect_left(corners, total, key=lambda scale: sum(clamped(scale)))
    right = corners[place]
    scale = right
    if place > 0:
        left = corners[place - 1]
        below, above = sum(clamped(left)), sum(clamped(right))
        scale = left + (right - left) * (total - below) / (above - below)
    shares = clamped(scale)
    limits = [whole(share) for share in shares]
    by_fraction = sorted(range(rows), key=lambda h: (limits[h] - shares[h], h))
    for h in by_fraction[: total - sum(limits)]:
        limits[h] += 1
    return limits


def allocate_budget(group, weight, length, total, floor):
    """Limits [N][H] of tensors as the operator takes them."""
    tables = weight.tolist() if weight.dim() == 2 else [weight.tolist()] * len(group)
    return [
        allocate([table[g] for g in ids], n, t, floor)
        for ids, table, n, t in zip(group.tolist(), tables, length.tolist(), total.tolist(), strict=True)
    ]
