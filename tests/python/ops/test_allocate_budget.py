# SPDX-License-Identifier: Apache-2.0
"""allocate_budget: the plans of the method, token for token, and what must hold for every plan."""

from fractions import Fraction

import pytest
import torch
from budget_vectors import VECTORS
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.allocate_budget import allocate_budget as reference
from reference.group_heads import group_sizes
from support import assert_same_bits_for_threads, capture_graph, opcheck

import uncomp
from uncomp import _extension, ops


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def linear_weights(num_groups, spread=None):
    """1 - x + 2 x g / (G - 1) with x = p / q, times q (G - 1)."""
    x = Fraction(1, 3) if num_groups == 2 else Fraction(2, 3)
    x = x if spread is None else spread
    if num_groups == 1:
        return [1]
    p, q = x.numerator, x.denominator
    return [q * (num_groups - 1) - p * (num_groups - 1) + 2 * p * g for g in range(num_groups)]


def groups_of(rows, num_groups):
    return [g for g, size in enumerate(group_sizes(rows, num_groups)) for _ in range(size)]


def plan(rows, num_groups, mean, length, *, weights=None, floor=8, device="cpu"):
    """Limits of one sequence whose rows lie in ascending order."""
    weights = linear_weights(num_groups) if weights is None else weights
    args = ([groups_of(rows, num_groups)], weights, [length], [rows * mean])
    return ops.allocate_budget(*(int32(a, device) for a in args), floor)[0].tolist()


# ---- values
@pytest.mark.parametrize(("rows", "num_groups", "mean", "length", "want"), VECTORS)
def test_vectors_of_the_method(device, rows, num_groups, mean, length, want):
    assert plan(rows, num_groups, mean, length, device=device) == want


PRESETS = {  # lowest entropy first, and the mean over 32 rows
    "g2": ([256, 512], 384),
    "g2-64": ([43, 86], 64.5),
    "g2-wide": ([240, 528], 384),
    "g2-wider": ([128, 640], 384),
    "g2-ref(512)": ([384, 768], 576),
    "g3": ([32, 384, 736], 384),
    "g3.1": ([192, 384, 576], 384),
    "g3.2": ([128, 384, 640], 384),
    "g3.3": ([64, 384, 704], 384),
    "g4": ([128, 298, 470, 640], 384),
    "g5": ([256, 320, 384, 448, 512], 384),
    "g5.1": ([128, 256, 384, 512, 640], 384),
    "g8": ([20, 128, 256, 384, 384, 512, 640, 748], 384),
    "g8.0": ([32, 132, 232, 334, 434, 534, 635, 736], 383.625),
    "g8.1": ([129, 202, 275, 348, 421, 494, 567, 640], 384.5),
    "g8.2": ([64, 158, 249, 340, 431, 522, 613, 704], 385.125),
    "g8.4": ([320, 340, 358, 376, 394, 412, 430, 448], 384.75),
    "g3-64": ([16, 64, 112], 64),
    "g3-64.1": ([12, 64, 116], 64),
    "g4-64": ([16, 48, 80, 112], 64),
    "g4-64.1": ([12, 47, 81, 116], 64),
    "g5-64": ([16, 40, 64, 88, 112], 64),
    "g5-64.1": ([12, 38, 64, 90, 116], 64),
    "g8-64": ([16, 30, 44, 64, 64, 84, 98, 112], 64),
    "g8-64.1": ([12, 27, 42, 56, 72, 86, 101, 116], 64),
    "g32": (list(range(144, 641, 16)), 392),
    "linear(640, 74, 8)": ([122, 196, 270, 344, 418, 492, 566, 640], 381),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_their_own_limits(device, name):
    # T = sum of size * value, so lambda is 1 and every row gets its group's value; in floats 418 would become 417.
    values, mean = PRESETS[name]
    group = groups_of(32, len(values))
    total = sum(values[g] for g in group)
    assert total == mean * 32
    limit = ops.allocate_budget(int32([group], device), int32(values, device), int32([8192], device),
                                int32([total], device), 8)  # fmt: skip
    assert limit[0].tolist() == [values[g] for g in group]


def test_tiny_groups(device):
    # extreme=12 at b = 64: low 12, high 116.
    assert plan(8, 2, 64, 4096, weights=[12, 116], device=device) == [12] * 4 + [116] * 4


@pytest.mark.parametrize(("rows", "num_groups"), [(1, 1), (31, 4), (64, 64), (257, 9), (1025, 33), (2048, 2048)])
def test_equals_reference(device, rows, num_groups):
    generator = torch.Generator().manual_seed(rows)
    group = torch.randint(0, num_groups, (3, rows), generator=generator, dtype=torch.int32)
    weight = torch.randint(1, 1000, (3, num_groups), generator=generator, dtype=torch.int32)
    length, total = int32([30, 100, 5000]), int32([rows * 40, rows * 40, rows * 900 + 7])
    limit = ops.allocate_budget(*(t.to(device) for t in (group, weight, length, total)), 5)
    assert limit.tolist() == reference(group, weight, length, total, 5)


# ---- edges
def test_a_plan_does_not_depend_on_its_batch(device):
    group = int32([[0, 1, 1], [1, 0, 1], [0, 0, 1]], device)
    weight, length, total = int32([2, 3], device), int32([50, 7, 900], device), int32([100, 100, 101], device)
    together = ops.allocate_budget(group, weight, length, total, 4)
    for n in range(3):
        alone = ops.allocate_budget(group[n : n + 1], weight, length[n : n + 1], total[n : n + 1], 4)
        assert torch.equal(together[n : n + 1], alone)


def test_largest_numbers_do_not_overflow(device):
    rows, most, heavy = 16384, 2**31 - 1, 2**20
    group = (torch.arange(rows, dtype=torch.int32) % 3)[None]
    weight, floor = int32([1, heavy - 1, heavy]), 7
    for length in (0, 200_000, most):
        limit = ops.allocate_budget(*(t.to(device) for t in (group, weight, int32([length]), int32([most]))), floor)
        assert int(limit.long().sum()) == most
        assert int(limit.min()) >= floor
        for g in range(3):
            of_group = limit[0].cpu()[group[0] == g]
            assert int(of_group.max() - of_group.min()) <= 1


def test_one_row_takes_all(device):
    assert plan(1, 1, 2**31 - 1, 10, device=device) == [2**31 - 1]
    assert plan(1, 1, 384, 4096, device=device) == [384]


def test_unused_groups_and_total_of_floors(device):
    group, weight = int32([[5, 5, 2]], device), int32([1, 1, 9, 1, 1, 3], device)
    limit = ops.allocate_budget(group, weight, int32([100], device), int32([24], device), 8)
    assert limit.tolist() == [[8, 8, 8]]


def test_length_zero_still_has_limits(device):
    limit = ops.allocate_budget(int32([[0, 1]], device), int32([1, 3], device), int32([0], device),
                                int32([8], device), 0)  # fmt: skip
    assert limit.tolist() == [[2, 6]]


def test_empty(device):
    weight, none = int32([1, 2], device), int32([], device)
    assert ops.allocate_budget(torch.zeros(0, 4, dtype=torch.int32, device=device), weight, none, none, 1).shape == (
        0,
        4,
    )
    group = torch.zeros(2, 0, dtype=torch.int32, device=device)
    assert ops.allocate_budget(group, weight, int32([1, 1], device), int32([5, 5], device), 1).shape == (2, 0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_plan_keeps_its_promises(data):
    # Sum exact, bounds kept, heavier never fewer, equal to the fractions; or the error that the contract names.
    rows, num_groups = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 6))
    count = data.draw(st.integers(1, 3))

    def draw_list(low, high, size):
        return data.draw(st.lists(st.integers(low, high), min_size=size, max_size=size))

    group = [draw_list(0, num_groups - 1, rows) for _ in range(count)]
    weight = [sorted(draw_list(1, data.draw(st.sampled_from([4, 50, 2**20])), num_groups)) for _ in range(count)]
    floor = data.draw(st.integers(0, 20))
    length = draw_list(0, data.draw(st.sampled_from([30, 500])), count)
    total = [rows * floor + data.draw(st.integers(-5, 3000)) for _ in range(count)]
    tensors = [int32(x) for x in (group, weight, length, total)]
    if any(t < rows * floor for t in total):
        with pytest.raises(ValueError, match=r"uncomp::allocate_budget: total must be at least rows \* floor"):
            ops.allocate_budget(*tensors, floor)
        return
    limit = ops.allocate_budget(*tensors, floor).tolist()
    assert limit == reference(*tensors, floor)
    for row, ids, table, n, t in zip(limit, group, weight, length, total, strict=True):
        assert sum(row) == t
        assert min(row) >= floor
        assert n * rows > t or min(row) >= n
        assert n * rows <= t or max(row) <= n
        pairs = sorted(zip([table[g] for g in ids], row, strict=True))
        for (light, few), (heavy, many) in zip(pairs, pairs[1:]):  # noqa: B905, RUF007
            assert heavy == light or many >= few
            assert heavy != light or many - few <= 1


# ---- errors
GOOD = {"group": int32([[0, 1]]), "weight": int32([1, 2]), "length": int32([9]), "total": int32([20])}


@pytest.mark.parametrize(
    ("change", "floor", "kind", "text"),
    [
        ({"group": torch.zeros(1, 2)}, 1, TypeError, "group must be int32; got float32"),
        ({"group": int32([0, 1])}, 1, ValueError, r"group must have shape \[N, H\]; got \[2\]"),
        ({"group": int32([[0, 9, 1, 9]])[:, ::2]}, 1, ValueError, "group must be contiguous"),
        ({"weight": torch.ones(2)}, 1, TypeError, "weight must be int32; got float32"),
        ({"weight": int32([])}, 1, ValueError, "weight must hold at least one group"),
        ({"weight": int32([[1, 2], [1, 2]])}, 1, ValueError, r"weight must have shape \[G\] or \[N, G\] with N = 1"),
        ({"weight": int32([0, 2])}, 1, ValueError, r"weight must lie in \[1, 1048576\]; got 0"),
        ({"weight": int32([1, 2**20 + 1])}, 1, ValueError, "got 1048577"),
        ({"group": int32([[0, 2]])}, 1, ValueError, r"group must lie in \[0, G = 2\); got 2"),
        ({"group": int32([[-1, 0]])}, 1, ValueError, "got -1"),
        ({"length": int32([9, 9])}, 1, ValueError, r"length must have shape \[N\] = \[1\]"),
        ({"length": int32([-1])}, 1, ValueError, "length must not be negative; got -1"),
        ({"total": torch.tensor([20])}, 1, TypeError, "total must be int32; got int64"),
        ({"total": int32([20])}, 11, ValueError, r"total must be at least rows \* floor = 22; got 20"),
        ({"total": int32([-1])}, 0, ValueError, "got -1"),
        ({}, -1, ValueError, r"floor must lie in \[0, 2\^31\); got -1"),
        ({}, 2**31, ValueError, "got 2147483648"),
        ({"group": torch.zeros(1, 16385, dtype=torch.int32)}, 1, NotImplementedError, "rows H must be at most 16384"),
        ({"weight": torch.ones(16385, dtype=torch.int32)}, 1, NotImplementedError, "groups G must be at most 16384"),
    ],
)
def test_errors_name_the_argument(change, floor, kind, text):
    args = {**GOOD, **change}
    with pytest.raises(kind, match="uncomp::allocate_budget: .*" + text):
        ops.allocate_budget(**args, floor=floor)


def test_the_bound_function_is_the_operator():
    assert torch.equal(_extension._C.allocate_budget(**GOOD, floor=1), ops.allocate_budget(**GOOD, floor=1))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "floor", "want", "text"),
    [
        ({"total": int32([20])}, 11, [[11, 11]], "total must be at least"),
        ({"total": int32([-7])}, 0, [[0, 0]], "total must be at least"),
        ({"group": int32([[-3, 9]])}, 1, [[7, 13]], "group must lie in"),
        ({"weight": int32([-5, 2])}, 1, [[7, 13]], "group must lie in"),
    ],
)
def test_violations_on_the_device_are_clamped_and_reported(change, floor, want, text):
    args = {name: t.cuda() for name, t in {**GOOD, "length": int32([50]), **change}.items()}
    assert ops.allocate_budget(**args, floor=floor).tolist() == want
    with pytest.raises(ValueError, match="uncomp::allocate_budget: " + text):
        uncomp.raise_device_errors()


# ---- opcheck
def test_opcheck(device):
    opcheck("allocate_budget", *(t.to(device) for t in GOOD.values()), 2)


# ---- compile
def test_compile_fullgraph(device):
    args = {name: t.to(device) for name, t in GOOD.items()}
    compiled = torch.compile(lambda total: ops.allocate_budget(**{**args, "total": total * 2}, floor=2), fullgraph=True)
    want = ops.allocate_budget(**{**args, "total": args["total"] * 2}, floor=2)
    assert torch.equal(compiled(args["total"]), want)


@pytest.mark.gpu
def test_graph_replay_follows_lengths_and_totals():
    group, weight = int32([groups_of(8, 8)] * 2, "cuda"), int32(linear_weights(8), "cuda")
    length, total = int32([4096, 4096], "cuda"), int32([3072, 3072], "cuda")
    replay, limit = capture_graph(lambda: ops.allocate_budget(group, weight, length, total, 8))
    length.copy_(int32([600, 300]))
    total.copy_(int32([3072, 2048]))
    replay()
    assert limit.tolist() == reference(group, weight, length, total, 8)


def test_the_number_of_threads_changes_no_bit():
    group, weight = torch.randint(0, 40, (17, 1000), dtype=torch.int32), torch.randint(1, 99, (40,), dtype=torch.int32)
    length, total = int32([200] * 17), int32([100_001] * 17)
    assert_same_bits_for_threads(lambda: (ops.allocate_budget(group, weight, length, total, 8),))


@pytest.mark.gpu
def test_the_same_input_gives_the_same_bits():
    group = torch.randint(0, 40, (7, 3000), dtype=torch.int32, device="cuda")
    weight = torch.randint(1, 99, (40,), dtype=torch.int32, device="cuda")
    length, total = int32([200] * 7, "cuda"), int32([300_001] * 7, "cuda")
    first = ops.allocate_budget(group, weight, length, total, 8)
    assert first.tolist() == reference(group, weight, length, total, 8)
    for _ in range(20):
        assert torch.equal(first, ops.allocate_budget(group, weight, length, total, 8))
