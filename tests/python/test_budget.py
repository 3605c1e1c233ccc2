# SPDX-License-Identifier: Apache-2.0
"""budget: whole tokens from budgets and shapes; every sum exact."""

from fractions import Fraction

import pytest
import torch
from budget_vectors import VECTORS
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.allocate_budget import allocate_budget as reference

from uncomp import budget, ops
from uncomp.grouping import group_sizes, labels


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def plan(rows, num_groups, mean, n, *, weights=None, floor=8, device="cpu"):
    """Limits of one sequence whose rows lie in ascending order."""
    weights = budget.group_weights(num_groups) if weights is None else weights
    return budget.limits(int32([labels(rows, num_groups)], device), weights, n, rows * mean, floor)[0].tolist()


# ---- values
@pytest.mark.parametrize(
    ("value", "n", "want"),
    [
        (384, 100, 384),
        (8, 0, 8),
        (1.0, 1000, 1000),
        (0.1, 1000, 100),
        (0.1, 4, 8),
        (0.5, 101, 51),  # rounded half up
        (0.15, 10 * 17 + 20, 29),  # 28.5: in binary 0.15 is less than 0.15
        (0.29, 100 * 50, 1450),
        (1.0, 3, 8),
        (Fraction(1, 3), 100, 33),
    ],
)
def test_mean_tokens(value, n, want):
    assert budget.mean_tokens(value, n, 8) == want


@pytest.mark.parametrize(
    ("num_groups", "spread", "want"),
    [
        (1, None, [1]),
        (1, 0.5, [1]),
        (2, None, [1, 2]),
        (3, None, [1, 3, 5]),
        (4, None, [3, 7, 11, 15]),
        (8, None, [7, 11, 15, 19, 23, 27, 31, 35]),
        (2, Fraction(2, 3), [1, 5]),
        (2, 0.1, [9, 11]),
        (5, 0, [1] * 5),
        (3, 0.5, [1, 2, 3]),
    ],
)
def test_group_weights(num_groups, spread, want):
    assert budget.group_weights(num_groups, spread) == want


@given(st.integers(2, 64), st.fractions(0, 1, max_denominator=500).filter(lambda x: x < 1))
def test_group_weights_are_the_formula(num_groups, spread):
    weights = budget.group_weights(num_groups, spread)
    shares = [1 - spread + 2 * spread * Fraction(g, num_groups - 1) for g in range(num_groups)]
    assert [Fraction(w, weights[0]) for w in weights] == [s / shares[0] for s in shares]
    assert budget.integer_weights(weights) == weights


@pytest.mark.parametrize(("rows", "num_groups", "mean", "n", "want"), VECTORS)
def test_vectors_of_the_method(device, rows, num_groups, mean, n, want):
    assert plan(rows, num_groups, mean, n, device=device) == want


def test_extreme_groups():
    assert budget.extreme_weights(12, 64, 8, 8) == [3, 29]
    assert plan(8, 2, 64, 4096, weights=budget.extreme_weights(12, 64, 8, 8)) == [12] * 4 + [116] * 4
    # Groups of different sizes: the low rows get N exactly, the high ones what is left, one token apart at most.
    assert plan(7, 2, 65, 4096, weights=budget.extreme_weights(12, 65, 7, 8)) == [12] * 3 + [105, 105, 105, 104]
    assert budget.extreme_weights(64, 64, 8, 8) == [1, 1]


@given(st.integers(2, 40), st.integers(8, 200), st.integers(0, 1000))
def test_extreme_limits_are_exact(rows, low, more):
    mean = low + more
    limits = plan(rows, 2, mean, 10**6, weights=budget.extreme_weights(low, mean, rows, 8))
    low_rows = group_sizes(rows, 2)[0]
    assert limits[:low_rows] == [low] * low_rows
    assert sum(limits) == rows * mean
    assert max(limits[low_rows:]) - min(limits[low_rows:]) <= 1


def test_layer_means_by_hand():
    # b' = 20, last = 20 / 20 = 1, first = 40 - 1 = 39: 47, 34.33, 21.67, 9; the missing tokens go to the fractions.
    assert budget.layer_means(28, 1000, 4, "pyramid", 8) == [47, 34, 22, 9]
    # n - W = 30 caps the first layer; the last one gets 40 - 30 = 10.
    assert budget.layer_means(28, 38, 3, "pyramid", 8) == [38, 28, 18]
    assert budget.layer_means(384, 4096, 5, "uniform", 8) == [384] * 5
    assert budget.layer_means(384, 4096, 1, "pyramid", 8) == [384]
    assert budget.layer_means(8, 4096, 3, "pyramid", 8) == [8, 8, 8]


@given(st.integers(1, 80), st.integers(0, 40), st.integers(0, 3000), st.integers(0, 5000), st.integers(1, 40))
def test_layer_means_keep_their_promises(num_layers, floor, more, n, beta):
    b = floor + more
    for shape in budget.LAYER_SHAPES:
        means = budget.layer_means(b, n, num_layers, shape, floor, beta)
        assert sum(means) == num_layers * b
        assert min(means) >= floor
        assert n > b or min(means) >= n  # a prompt within the budget loses nothing in any layer
        if n > 2 * b:
            assert means == sorted(means, reverse=True)


def test_limits_take_numbers_lists_and_tensors(device):
    group = int32([[0, 1, 1], [1, 0, 1]], device)
    want = ops.allocate_budget(
        group, int32([2, 3], device), int32([50, 900], device), int32([100, 101], device), 4
    )  # fmt: skip
    assert torch.equal(budget.limits(group, [2, 3], [50, 900], [100, 101], 4), want)
    assert torch.equal(budget.limits(group, (2, 3), int32([50, 900], device), int32([100, 101], device), 4), want)
    each = int32([[2, 3], [3, 2]], device)
    assert budget.limits(group, each, 900, 100, 4).tolist() == reference(
        group, each, int32([900, 900]), int32([100, 100]), 4
    )


# ---- edges
@settings(deadline=None)
@given(st.integers(1, 20), st.data())
def test_every_plan_keeps_its_promises(rows, data):
    num_groups = data.draw(st.integers(1, rows))
    floor = data.draw(st.integers(1, 20))
    mean = floor + data.draw(st.integers(0, 300))
    n = data.draw(st.integers(0, 600))
    got = plan(rows, num_groups, mean, n, floor=floor)
    assert sum(got) == rows * mean
    assert min(got) >= floor
    assert n > mean or min(got) >= n  # loses nothing
    stored = [min(limit, n) for limit in got]
    assert n <= mean or sum(stored) == rows * mean
    most_below = 0
    for group in range(num_groups):
        of_group = [limit for limit, label in zip(got, labels(rows, num_groups), strict=True) if label == group]
        assert max(of_group) - min(of_group) <= 1
        assert min(of_group) >= most_below
        most_below = max(of_group)


def test_the_largest_weight_is_the_operators():
    group = int32([[0, 1]])
    assert budget.limits(group, [1, budget.MAX_WEIGHT], 100, 60, 8).tolist() == [[8, 52]]
    with pytest.raises(ValueError, match=r"uncomp::allocate_budget: weight must lie in"):
        ops.allocate_budget(group, int32([1, budget.MAX_WEIGHT + 1]), int32([100]), int32([60]), 8)


# ---- errors
def test_error_texts():
    with pytest.raises(ValueError, match=r"budget must be at least window \+ sinks = 8 tokens; got 7"):
        budget.mean_tokens(7, 100, 8)
    for share in (0.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"a budget given as a share must lie in \(0, 1\]; got {share}"):
            budget.mean_tokens(share, 100, 8)
    for other in (True, "384", None):
        with pytest.raises(TypeError, match=r"budget must be an int \(tokens\) or a float \(share\)"):
            budget.mean_tokens(other, 100, 8)
    for spread in (1.5, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"spread must lie in \[0, 1\); got {spread}"):
            budget.group_weights(4, spread)
    with pytest.raises(ValueError, match="num_groups must be at least 1; got 0"):
        budget.group_weights(0)
    with pytest.raises(ValueError, match=r"weights in lowest terms must not pass 1048576; got .*fewer digits"):
        budget.group_weights(4, 0.123456789)
    with pytest.raises(ValueError, match="weights must be positive; got \\['1', '0'\\]"):
        budget.integer_weights([1, 0])
    with pytest.raises(
        ValueError, match=r"extreme must lie between window \+ sinks = 8 and the mean of 64 tokens; got 7"
    ):
        budget.extreme_weights(7, 64, 8, 8)
    with pytest.raises(ValueError, match="got 65"):
        budget.extreme_weights(65, 64, 8, 8)
    with pytest.raises(ValueError, match=r"num_groups must lie in \[1, rows = 1\]; got 2"):
        budget.extreme_weights(12, 64, 1, 8)
    with pytest.raises(ValueError, match=r"b must be at least window \+ sinks = 8 tokens; got 7"):
        budget.layer_means(7, 100, 4, "uniform", 8)
    with pytest.raises(ValueError, match="layer_shape must be one of uniform, pyramid; got 'cone'"):
        budget.layer_means(64, 100, 4, "cone", 8)
    with pytest.raises(ValueError, match="num_layers must be at least 1; got 0"):
        budget.layer_means(64, 100, 0, "uniform", 8)
    with pytest.raises(ValueError, match="beta must be at least 1; got 0"):
        budget.layer_means(64, 100, 4, "pyramid", 8, 0)


def test_host_numbers_are_checked_on_every_device(device):
    group = int32([[0, 1]], device)
    with pytest.raises(ValueError, match=r"weights must lie in \[1, 1048576\]; got \[0, 1\]"):
        budget.limits(group, [0, 1], 100, 60, 8)
    with pytest.raises(ValueError, match=r"totals must be at least rows \* floor = 16; got 15"):
        budget.limits(group, [1, 2], 100, 15, 8)
    with pytest.raises(ValueError, match=r"totals must be at least rows \* floor = 16; got 3"):
        budget.limits(group, [1, 2], 100, [60, 3], 8)
