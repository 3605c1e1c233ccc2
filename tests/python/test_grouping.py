# SPDX-License-Identifier: Apache-2.0
"""grouping: sizes of the groups, the road from votes to groups, and the orders that budgets are compared under."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import group_heads as reference
from support import published_votes

from uncomp import grouping, ops


# ---- values
@pytest.mark.parametrize(
    ("rows", "num_groups", "want"),
    [
        (32, 2, [16, 16]),
        (32, 3, [11, 10, 11]),
        (32, 4, [8] * 4),
        (32, 5, [7, 6, 6, 6, 7]),
        (32, 8, [4] * 8),
        (32, 32, [1] * 32),
        (40, 8, [5] * 8),
        (3, 2, [1, 2]),
        (5, 1, [5]),
    ],
)
def test_sizes_of_the_method(rows, num_groups, want):
    assert grouping.group_sizes(rows, num_groups) == want
    assert grouping.labels(rows, num_groups) == [g for g, size in enumerate(want) for _ in range(size)]


def test_two_groups_are_the_upper_half_by_sum_of_labels():
    votes = [[3, 7], [9, 1], [3, 7], [5, 5], [0, 10]]  # [row][label]
    assert grouping.groups_from_labels(votes) == [[1, 3], [0, 2, 4]]
    # a tie goes to the lower row
    assert grouping.groups_from_labels([[3, 7], [3, 7], [5, 5], [0, 10]]) == [[0, 2], [1, 3]]
    # and groups may have sizes of their own, as where one row is deleted
    assert grouping.groups_from_labels([[3, 7], [3, 7], [5, 5], [0, 10]], [1, 3]) == [[2], [0, 1, 3]]


def test_groups_are_taken_from_the_lowest_label_up():
    # Row 0 has most votes for label 1, but label 0 takes it first.
    votes = [[4, 6, 0], [3, 1, 6], [3, 3, 4]]
    assert grouping.groups_from_labels(votes) == [[0], [2], [1]]


def test_rank_votes_serve_every_number_of_groups():
    rank_votes = [[0, 1, 0, 3], [4, 0, 0, 0], [0, 0, 4, 0], [0, 3, 0, 1]]
    assert grouping.label_votes(rank_votes, 2) == [[1, 3], [4, 0], [0, 4], [3, 1]]
    assert grouping.groups_from_votes(rank_votes, 2) == [[1, 3], [0, 2]]
    assert grouping.groups_from_votes(rank_votes, 4) == [[1], [3], [2], [0]]
    assert grouping.groups_from_votes(rank_votes, 1) == [[0, 1, 2, 3]]
    assert grouping.group_ids([[1, 3], [0, 2]]) == [1, 0, 1, 0]


def test_published_votes_two_groups():
    low, _ = grouping.groups_from_labels(published_votes("512__llama2-chat__query")[15])
    assert low == [1, 2, 3, 7, 8, 9, 13, 18, 19, 20, 22, 23, 24, 27, 30, 31]


def test_published_votes_five_groups():
    assert grouping.groups_from_labels(published_votes("llama2-chat__5_groups__svd32")[15]) == [
        [1, 2, 8, 9, 13, 22, 23],
        [3, 18, 20, 24, 30, 31],
        [0, 7, 17, 19, 25, 27],
        [4, 6, 16, 26, 28, 29],
        [5, 10, 11, 12, 14, 15, 21],
    ]


def test_published_votes_eight_groups():
    assert grouping.groups_from_labels(published_votes("llama3-instruct__8_groups__svd32")[0]) == [
        [1, 3, 7, 24],
        [4, 6, 28, 31],
        [0, 12, 13, 14],
        [2, 9, 10, 26],
        [5, 8, 17, 27],
        [16, 23, 25, 29],
        [18, 19, 22, 30],
        [11, 15, 20, 21],
    ]


def test_online_equals_the_profile_of_one_prompt(device):
    # One sample has one vote a row, so votes and the online order are the same.
    entropy = torch.rand(3, 13, device=device)
    for num_groups in (1, 2, 5, 13):
        ids = grouping.groups_online(entropy, num_groups)
        assert ids.dtype == torch.int32 and ids.device == entropy.device and ids.is_contiguous()
        for b, values in enumerate(entropy.tolist()):
            ranked = sorted(range(13), key=lambda row: (values[row], row))
            votes = [[int(ranked[rank] == row) for rank in range(13)] for row in range(13)]
            assert ids[b].tolist() == grouping.group_ids(grouping.groups_from_votes(votes, num_groups))


def test_online_order_of_ties_and_nan(device):
    entropy = torch.tensor([[0.5, math.nan, 0.1, 0.5], [0.2, 0.2, 0.2, 0.2]], device=device)
    assert grouping.groups_online(entropy, 4).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert grouping.groups_online(entropy, 2, "reverse").tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]


def test_random_order_is_fixed_by_seed_and_layer(device):
    first = grouping.groups_online(torch.rand(2, 16, device=device), 4, "random", seed=7, layer=3)
    other = grouping.groups_online(torch.rand(5, 16, device=device), 4, "random", seed=7, layer=3)
    assert first.dtype == torch.int32 and first.is_contiguous() and first.device.type == device
    assert first[0].tolist() == other[4].tolist() == grouping.random_groups(16, 4, 7, 3)
    assert sorted(first[0].tolist()) == grouping.labels(16, 4)
    layers = {tuple(grouping.random_groups(16, 4, 7, layer)) for layer in range(8)}
    seeds = {tuple(grouping.random_groups(16, 4, seed, 3)) for seed in range(8)}
    assert len(layers) == len(seeds) == 8


def test_random_order_never_changes():
    # Results under order="random" must be comparable between versions.
    assert grouping.random_groups(8, 2, 42, 0) == [1, 1, 0, 0, 1, 0, 0, 1]
    assert grouping.random_groups(8, 2, 42, 1) == [0, 0, 1, 1, 1, 1, 0, 0]


def test_a_row_written_into_does_not_spoil_the_next_call():
    ids = grouping.groups_online(torch.rand(1, 6), 2, "random")
    ids.zero_()
    assert grouping.groups_online(torch.rand(1, 6), 2, "random")[0].tolist() == grouping.random_groups(6, 2, 42, 0)


def test_orders_of_a_profile_keep_the_sizes():
    ids = [0, 1, 2, 2, 1, 0, 0]
    assert grouping.ordered(ids, 3) == ids
    assert grouping.ordered(ids, 3, "reverse") == [2, 1, 0, 0, 1, 2, 2]
    assert grouping.ordered(ids, 3, "random", seed=1, layer=2) == grouping.random_groups(7, 3, 1, 2)


# ---- edges
@given(st.integers(1, 60), st.data())
def test_sizes_agree_with_the_reference_and_the_operator(rows, data):
    num_groups = data.draw(st.integers(1, rows))
    assert grouping.group_sizes(rows, num_groups) == reference.group_sizes(rows, num_groups)
    ranked = ops.group_heads(torch.arange(rows, dtype=torch.float32)[None], num_groups)[0]
    assert ranked[0].tolist() == grouping.labels(rows, num_groups)


@settings(deadline=None)
@given(st.data())
def test_groups_hold_every_row_once_whatever_the_votes(data):
    rows = data.draw(st.integers(1, 12))
    num_groups = data.draw(st.integers(1, rows))
    line = st.lists(st.integers(0, 9), min_size=num_groups, max_size=num_groups)
    groups = grouping.groups_from_labels(data.draw(st.lists(line, min_size=rows, max_size=rows)))
    assert [len(group) for group in groups] == grouping.group_sizes(rows, num_groups)
    assert sorted(row for group in groups for row in group) == list(range(rows))
    assert all(group == sorted(group) for group in groups)


# ---- errors
def test_error_texts():
    for call in (grouping.group_sizes, grouping.labels):
        with pytest.raises(ValueError, match=r"num_groups must lie in \[1, rows = 4\]; got 5"):
            call(4, 5)
        with pytest.raises(ValueError, match=r"num_groups must lie in \[1, rows = 4\]; got 0"):
            call(4, 0)
    with pytest.raises(ValueError, match=r"rank_votes must be \[2\]\[2\]; row 1 has 1 ranks"):
        grouping.label_votes([[1, 0], [1]], 2)
    with pytest.raises(ValueError, match=r"votes must be \[H\]\[G\] with one G; got rows of \[1, 2\] labels"):
        grouping.groups_from_labels([[1, 0], [1]])
    with pytest.raises(ValueError, match=r"votes must be \[H\]\[G\]"):
        grouping.groups_from_labels([])
    with pytest.raises(ValueError, match=r"num_groups must lie in \[1, rows = 1\]; got 2"):
        grouping.groups_from_labels([[1, 0]])
    with pytest.raises(ValueError, match=r"sizes must be 2 numbers that sum to 2; got \[2, 1\]"):
        grouping.groups_from_labels([[1, 0], [0, 1]], [2, 1])
    with pytest.raises(ValueError, match=r"groups must hold each row of 0 \.\. H - 1 once"):
        grouping.group_ids([[0, 1], [1]])
    with pytest.raises(ValueError, match="order must be one of ascending, reverse, random; got 'up'"):
        grouping.groups_online(torch.rand(1, 4), 2, "up")
    with pytest.raises(ValueError, match="order must be one of"):
        grouping.ordered([0, 1], 2, "up")
    with pytest.raises(ValueError, match=r"entropy must have shape \[B, H\]; got \[4\]"):
        grouping.groups_online(torch.rand(4), 2, "random")
