# SPDX-License-Identifier: Apache-2.0
"""group_heads: one ranking whatever ties, zeros and NaN there are, cut into the sizes of the method."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.group_heads import group_heads as reference
from reference.group_heads import group_sizes
from support import assert_same_bits_for_threads, capture_graph, opcheck

import uncomp
from uncomp import _extension, ops

NAN, INF = float("nan"), float("inf")


def assert_equals_reference(entropy, num_groups, order="ascending"):
    group, rank = ops.group_heads(entropy, num_groups, order=order)
    want_group, want_rank = reference(entropy, num_groups, order)
    assert group.dtype == rank.dtype == torch.int32
    assert group.tolist() == want_group
    assert rank.tolist() == want_rank


# ---- values
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (32, [16, 16]),
        (32, [11, 10, 11]),
        (32, [8, 8, 8, 8]),
        (32, [7, 6, 6, 6, 7]),
        (32, [4] * 8),
        (32, [1] * 32),
        (40, [5] * 8),
        (3, [1, 2]),
    ],
)
def test_sizes_of_the_method(device, rows, sizes):
    # The worked sizes: rows in ascending order must fall into groups of exactly these.
    entropy = torch.arange(rows, dtype=torch.float32, device=device)[None]
    group, rank = ops.group_heads(entropy, len(sizes))
    assert group[0].tolist() == [g for g, size in enumerate(sizes) for _ in range(size)]
    assert rank[0].tolist() == list(range(rows))
    assert group_sizes(rows, len(sizes)) == sizes


def test_reductions_of_the_method(device):
    # Mean 0.4, 0.475 orders the rows 0, 1; max 0.6, 0.5 orders them 1, 0.
    entropy = torch.tensor([[0.4, 0.475], [0.6, 0.5]], device=device)
    assert ops.group_heads(entropy, 2)[1].tolist() == [[0, 1], [1, 0]]


def test_reverse_turns_groups_not_ranks(device):
    entropy = torch.rand(3, 7, device=device)
    group, rank = ops.group_heads(entropy, 3)
    turned, same_rank = ops.group_heads(entropy, 3, order="reverse")
    assert torch.equal(turned, 2 - group)
    assert torch.equal(same_rank, rank)


@pytest.mark.parametrize("rows", [1, 7, 32, 33, 256, 257, 700])
def test_equals_reference(device, rows):
    entropy = torch.rand(2, rows, device=device)
    for num_groups in {1, min(2, rows), min(5, rows), rows}:
        assert_equals_reference(entropy, num_groups)


# ---- edges
def test_ties_go_to_the_lower_row(device):
    # An unstable sort would make the groups of equal heads a matter of chance.
    entropy = torch.full((1, 300), 0.5, device=device)
    assert ops.group_heads(entropy, 3)[1].tolist() == [list(range(300))]


def test_nan_is_last_and_zeros_are_equal(device):
    entropy = torch.tensor([[NAN, 0.0, INF, -0.0, -NAN, -INF, 1e-45]], device=device)
    assert ops.group_heads(entropy, 2)[1].tolist() == [[5, 1, 4, 2, 6, 0, 3]]


def test_one_row_and_no_ranking(device):
    assert ops.group_heads(torch.tensor([[NAN]], device=device), 1)[0].tolist() == [[0]]
    assert [tuple(t.shape) for t in ops.group_heads(torch.zeros(0, 4, device=device), 2)] == [(0, 4), (0, 4)]


def test_rows_of_a_wider_tensor(device):
    wide = torch.rand(3, 20, device=device)
    assert_equals_reference(wide[:, 5:16], 4)
    assert_equals_reference(wide[:1, :8].expand(3, 8), 4)


values = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 0.25, 0.5]) | st.floats(width=32)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_calls_give_the_result_or_the_right_error(data):
    count, rows = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 40))
    num_groups = data.draw(st.integers(-1, rows + 2))
    order = data.draw(st.sampled_from(["ascending", "reverse", "random"]))
    flat = data.draw(st.lists(values, min_size=count * rows, max_size=count * rows))
    entropy = torch.tensor(flat, dtype=torch.float32).view(count, rows)
    if data.draw(st.booleans()):
        entropy = entropy.t().contiguous().t()
    strided = rows > 1 and entropy.stride(1) != 1
    if strided or not 1 <= num_groups <= rows or order == "random":
        with pytest.raises(ValueError, match=r"uncomp::group_heads: (entropy|num_groups|order) must"):
            ops.group_heads(entropy, num_groups, order=order)
    else:
        assert_equals_reference(entropy, num_groups, order)


# ---- errors
@pytest.mark.parametrize(
    ("entropy", "num_groups", "order", "kind", "text"),
    [
        (torch.zeros(1, 4, dtype=torch.float64), 2, "ascending", TypeError, "entropy must be float32; got float64"),
        (torch.zeros(4), 2, "ascending", ValueError, r"entropy must have shape \[N, H\]; got \[4\]"),
        (torch.zeros(4, 2).t(), 2, "ascending", ValueError, "entropy must be contiguous in its last dimension"),
        (torch.zeros(1, 4), 5, "ascending", ValueError, r"num_groups must lie in 1 .. H = 4; got 5"),
        (torch.zeros(1, 4), 0, "ascending", ValueError, "got 0"),
        (torch.zeros(1, 0), 1, "ascending", ValueError, "H = 0; got 1"),
        (torch.zeros(1, 4), 2, "random", ValueError, 'order must be "ascending" or "reverse"; got "random"'),
    ],
)
def test_errors_name_the_argument(entropy, num_groups, order, kind, text):
    with pytest.raises(kind, match="uncomp::group_heads: .*" + text):
        ops.group_heads(entropy, num_groups, order=order)


def test_the_bound_function_is_the_operator():
    entropy = torch.rand(2, 6)
    for got, want in zip(_extension._C.group_heads(entropy, 3), ops.group_heads(entropy, 3), strict=True):
        assert torch.equal(got, want)


# ---- opcheck
def test_opcheck(device):
    opcheck("group_heads", torch.rand(2, 8, device=device), 3, "reverse")


# ---- compile
def test_compile_fullgraph(device):
    entropy = torch.rand(2, 8, device=device)
    compiled = torch.compile(lambda e: ops.group_heads(e * 2, 3)[0] + 1, fullgraph=True)
    assert torch.equal(compiled(entropy), ops.group_heads(entropy, 3)[0] + 1)


@pytest.mark.gpu
def test_graph_replay_follows_the_entropy():
    entropy = torch.rand(2, 32, device="cuda")
    replay, (group, rank) = capture_graph(lambda: ops.group_heads(entropy, 5))
    entropy.copy_(entropy.flip(1))
    replay()
    want = reference(entropy, 5)
    assert (group.tolist(), rank.tolist()) == want


def test_the_number_of_threads_changes_no_bit():
    entropy = torch.randint(0, 9, (300, 64)).float()
    assert_same_bits_for_threads(lambda: ops.group_heads(entropy, 7))


@pytest.mark.gpu
def test_the_same_input_gives_the_same_bits():
    entropy = torch.randint(0, 9, (5, 1000), device="cuda").float()
    first = ops.group_heads(entropy, 7)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, ops.group_heads(entropy, 7), strict=True))
    assert uncomp.raise_device_errors() is None
