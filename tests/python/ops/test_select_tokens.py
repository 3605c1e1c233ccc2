# SPDX-License-Identifier: Apache-2.0
"""select_tokens: the vector of the method, every tie, every border, and the same choice on every device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.select_tokens import select_tokens as reference
from support import assert_same_bits_for_threads, capture_graph, opcheck

from uncomp import _extension, ops

NAN, INF = float("nan"), float("inf")


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def total_of(scores, length, keep_len, sink, window):
    n = length.long().clamp(0, scores.shape[1])
    return int(torch.minimum(torch.maximum(keep_len.long(), (n.clamp(max=sink + window))), n).sum())


def assert_equals_reference(scores, length, keep_len, *, sink=0, window=0, pool=1, pool_mode="max", slack=0):
    device = scores.device
    length, keep_len = int32(length, device), int32(keep_len, device)
    total = total_of(scores, length, keep_len, sink, window) + slack
    options = {"sink": sink, "window": window, "pool": pool, "pool_mode": pool_mode}
    index, row_start = ops.select_tokens(scores, length, keep_len, total, **options)
    want_index, want_start = reference(scores, length, keep_len, total, **options)
    assert index.dtype == row_start.dtype == torch.int32
    assert row_start.tolist() == want_start
    assert index.tolist() == want_index


def columns(kind, rows, count, seed=0):
    """Scores that make a selection hard, each in its own way."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rows, count, generator=generator)
    flags = torch.rand(rows, count, generator=generator)
    if kind == "sorted":
        return uniform.sort(1).values
    if kind == "constant":
        return torch.full((rows, count), 0.25)
    if kind == "two values":
        return (uniform > 0.5).float()
    if kind == "ties at the cut":
        return torch.where(flags < 0.99, torch.tensor(0.5), uniform)
    if kind == "denormals":
        return uniform * 1e-41
    if kind == "infinite":
        return torch.where(flags < 0.3, torch.tensor(INF), torch.where(flags > 0.7, torch.tensor(-INF), uniform - 0.5))
    if kind == "nan":
        return torch.where(flags < 0.6, torch.tensor(NAN), uniform - 0.5)
    if kind == "bf16":
        return (uniform - 0.5).bfloat16().float()
    if kind == "one bin":
        return 1 + uniform * 1e-4
    if kind == "zeros of both signs":
        return torch.where(flags < 0.5, torch.tensor(0.0), torch.tensor(-0.0))
    return uniform - 0.5


KINDS = [
    "uniform", "sorted", "constant", "two values", "ties at the cut", "denormals", "infinite", "nan", "bf16", "one bin",
    "zeros of both signs",
]  # fmt: skip


# ---- values
@pytest.mark.parametrize(
    ("pool", "pool_mode", "want"),
    [
        (3, "max", [0, 3, 4, 5, 8, 9]),
        (3, "avg", [1, 3, 4, 5, 8, 9]),
        (1, "max", [0, 4, 5, 6, 8, 9]),
        (1, "avg", [0, 4, 5, 6, 8, 9]),
    ],
)
def test_vector_of_the_method(device, pool, pool_mode, want):
    rows = torch.tensor(
        [
            [0.20, 0.05, 0.02, 0.03, 0.25, 0.10, 0.05, 0.06, 0.24, 0.00],
            [0.15, 0.04, 0.03, 0.04, 0.22, 0.08, 0.12, 0.07, 0.10, 0.15],
        ]
    )
    scores = rows.sum(0, keepdim=True).to(device)
    index, row_start = ops.select_tokens(
        scores, int32([10], device), int32([6], device), 6, sink=0, window=2, pool=pool, pool_mode=pool_mode
    )
    assert index.tolist() == want
    assert row_start.tolist() == [0, 6]


def test_vector_of_hidden_state_pruning(device):
    u = torch.tensor([[0.9, 0.1, 0.4, 0.05, 0.3, 0.02, 0.6, 0.1, 0.2, 0.15, 0.3, 0.5]], device=device)
    index, _ = ops.select_tokens(u, int32([12], device), int32([8], device), 8, sink=0, window=3)
    assert index.tolist() == [0, 2, 4, 6, 8, 9, 10, 11]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_reference(device, kind):
    # Mixed lengths and budgets in one call, with each pooling.
    scores = columns(kind, 5, 300).to(device)
    for pool, pool_mode in [(1, "max"), (7, "max"), (5, "avg")]:
        assert_equals_reference(
            scores, [300, 0, 17, 299, 250], [60, 9, 12, 298, 31], sink=3, window=8, pool=pool, pool_mode=pool_mode
        )


@pytest.mark.parametrize("keep", [-(2**31), -1, 0, 1, 12, 13, 63, 64, 65, 2**31 - 1])
def test_every_budget(device, keep):
    scores = columns("two values", 2, 64).to(device)
    assert_equals_reference(scores, [64, 40], [keep, keep], sink=4, window=8, pool=3)
    assert_equals_reference(scores, [64, 40], [keep, keep])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "count"), [(3, 4097), (8, 32768), (1, 131_071), (200, 2048), (300, 1030), (2, 450_000), (140, 60_000)]
)
def test_the_device_chooses_as_the_cpu(kind, rows, count):
    # One block a row, clusters, keys in the workspace, and row_start in its own launch.
    generator = torch.Generator().manual_seed(count)
    scores = columns(kind, rows, count, seed=rows)
    length = torch.randint(0, count + 1, (rows,), generator=generator, dtype=torch.int32)
    length[-1] = count
    keep = (length * torch.rand(rows, generator=generator)).int()
    total = total_of(scores, length, keep, 4, 32)
    for pool, pool_mode in [(1, "max"), (7, "max"), (129, "max"), (7, "avg")]:
        options = {"sink": 4, "window": 32, "pool": pool, "pool_mode": pool_mode}
        want = ops.select_tokens(scores, length, keep, total, **options)
        got = ops.select_tokens(scores.cuda(), length.cuda(), keep.cuda(), total, **options)
        assert all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))


# ---- edges
@pytest.mark.parametrize(("rows", "count"), [(0, 0), (0, 5), (3, 0), (1, 1)])
def test_empty(device, rows, count):
    scores = torch.zeros(rows, count, device=device)
    assert_equals_reference(scores, [count] * rows, [1] * rows, sink=1, window=1)


def test_sink_and_window_wider_than_the_row(device):
    scores = columns("uniform", 2, 10).to(device)
    assert_equals_reference(scores, [10, 3], [4, 1], sink=6, window=6)
    index, _ = ops.select_tokens(scores, int32([10, 3], device), int32([0, 0], device), 13, sink=2**40, window=2**62)
    assert index.tolist() == [*range(10), *range(3)]


def test_total_below_the_sum_cuts_the_last_rows(device):
    scores = columns("uniform", 4, 20).to(device)
    for slack in (-1, -6, -11, -24):
        assert_equals_reference(scores, [20] * 4, [6] * 4, window=2, slack=slack)


def test_total_above_the_sum_leaves_a_tail_of_minus_one(device):
    scores = columns("uniform", 4, 20).to(device)
    assert_equals_reference(scores, [20] * 4, [6] * 4, window=2, slack=9)
    assert_equals_reference(scores, [0] * 4, [6] * 4, window=2, slack=80)


def test_length_outside_is_clamped(device):
    assert_equals_reference(columns("uniform", 2, 20).to(device), [-5, 10**9], [7, 7], sink=1, window=2, pool=3)


def test_scores_behind_the_length_do_not_matter(device):
    # Padding may hold anything: a pooled NaN or Inf from behind would change the choice.
    scores = columns("uniform", 3, 50)
    poisoned = scores.clone()
    for row, n in enumerate([30, 11, 50]):
        poisoned[row, n:] = INF
        poisoned[row, n + 1 :: 2] = NAN
    for pool_mode in ("max", "avg"):
        options = {"sink": 1, "window": 3, "pool": 9, "pool_mode": pool_mode}
        args = (int32([30, 11, 50], device), int32([9, 9, 9], device), 27)
        clean = ops.select_tokens(scores.to(device), *args, **options)
        dirty = ops.select_tokens(poisoned.to(device), *args, **options)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_pooling_sees_sinks_but_not_the_window(device):
    # Column 0 is a sink whose large score lifts its neighbour; column 8 is in the window and lifts nobody.
    scores = torch.tensor([[9.0, 0, 0, 0, 0, 0, 0, 0, 9.0, 0]], device=device)
    index, _ = ops.select_tokens(scores, int32([10], device), int32([4], device), 4, sink=1, window=2, pool=3)
    assert index.tolist() == [0, 1, 8, 9]


def test_nan_is_below_minus_infinity(device):
    scores = torch.tensor([[NAN, -INF, NAN, -3e38, NAN]], device=device)
    for keep, want in [(1, [3]), (2, [1, 3]), (3, [0, 1, 3])]:
        index, _ = ops.select_tokens(scores, int32([5], device), int32([keep], device), keep, sink=0, window=0)
        assert index.tolist() == want


def test_a_nan_spoils_averages_not_maxima(device):
    scores = torch.tensor([[1.0, NAN, 3.0, 0.5, 0.25, 0.125]], device=device)
    args = (scores, int32([6], device), int32([2], device), 2)
    assert ops.select_tokens(*args, sink=0, window=0, pool=3, pool_mode="max")[0].tolist() == [1, 2]
    assert ops.select_tokens(*args, sink=0, window=0, pool=3, pool_mode="avg")[0].tolist() == [3, 4]


def test_rows_of_a_wider_tensor(device):
    wide = columns("uniform", 6, 90).to(device)
    assert_equals_reference(wide[::2, 7:58], [51, 30, 9], [10, 30, 5], window=4, pool=5)
    assert_equals_reference(wide[:1, :40].expand(3, 40), [40, 20, 10], [9, 9, 9], sink=2)


numbers = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 0.5, 1e-42]) | st.floats(width=32)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_random_calls_give_the_result_or_the_right_error(data):
    rows, count = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 30))
    flat = data.draw(st.lists(numbers, min_size=rows * count, max_size=rows * count))
    dtype = data.draw(st.sampled_from([torch.float32] * 6 + [torch.float64, torch.bfloat16]))
    scores = torch.tensor(flat, dtype=torch.float32).view(rows, count)
    layout = data.draw(st.sampled_from(["plain", "slice", "columns"]))
    if layout == "slice":
        scores = torch.nn.functional.pad(scores, (3, 2), value=NAN)[:, 3 : 3 + count]
    elif layout == "columns":
        scores = scores.t().contiguous().t()
    strided = count > 1 and scores.stride(1) != 1
    wild = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, count + 2)
    length, keep = (data.draw(st.lists(wild, min_size=rows, max_size=rows)) for _ in range(2))
    sink, window = (data.draw(st.integers(-1, 8) | st.just(2**40)) for _ in range(2))
    pool, pool_mode = data.draw(st.integers(-1, 9)), data.draw(st.sampled_from(["max", "avg"]))
    slack = data.draw(st.integers(-3, 3))
    length, keep = int32(length), int32(keep)
    total = total_of(scores, length, keep, max(sink, 0), max(window, 0)) + slack
    options = {"sink": sink, "window": window, "pool": pool, "pool_mode": pool_mode}
    wrong = strided or sink < 0 or window < 0 or pool < 1 or pool % 2 == 0 or not 0 <= total <= rows * count
    if dtype != torch.float32 or wrong:
        kind = TypeError if dtype != torch.float32 else ValueError
        with pytest.raises(kind, match="uncomp::select_tokens: "):
            ops.select_tokens(scores.to(dtype), length, keep, total, **options)
        return
    index, row_start = ops.select_tokens(scores, length, keep, total, **options)
    want_index, want_start = reference(scores, length, keep, total, **options)
    assert index.tolist() == want_index
    assert row_start.tolist() == want_start


# ---- errors
GOOD = {
    "scores": torch.zeros(2, 9), "length": int32([9, 5]), "keep_len": int32([4, 4]), "total_keep": 8, "sink": 1,
    "window": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"scores": torch.zeros(2, 9, dtype=torch.half)}, TypeError, "scores must be float32; got float16"),
        ({"scores": torch.zeros(9)}, ValueError, r"scores must have shape \[R, S\]; got \[9\]"),
        ({"scores": torch.zeros(9, 2).t()}, ValueError, "scores must be contiguous in its last dimension"),
        ({"length": torch.tensor([9, 5])}, TypeError, "length must be int32; got int64"),
        ({"length": int32([9])}, ValueError, r"length must have shape \[R\] = \[2\]; got \[1\]"),
        ({"keep_len": int32([4, 4, 4])}, ValueError, r"keep_len must have shape \[R\] = \[2\]; got \[3\]"),
        ({"keep_len": int32([4, 0, 4, 0])[::2]}, ValueError, "keep_len must be contiguous"),
        ({"total_keep": 19}, ValueError, r"total_keep must lie in \[0, R \* S = 18\]; got 19"),
        ({"total_keep": -1}, ValueError, "got -1"),
        ({"sink": -1}, ValueError, "sink must be at least 0; got -1"),
        ({"window": -2}, ValueError, "window must be at least 0; got -2"),
        ({"pool": 4}, ValueError, "pool must be odd and at least 1; got 4"),
        ({"pool": 131}, NotImplementedError, "pool must be at most 129; got 131"),
        ({"pool_mode": "sum"}, ValueError, 'pool_mode must be "max" or "avg"; got "sum"'),
    ],
)
def test_errors_name_the_argument(change, kind, text):
    with pytest.raises(kind, match="uncomp::select_tokens: .*" + text):
        ops.select_tokens(**{**GOOD, **change})


@pytest.mark.gpu
def test_mixed_devices_are_refused():
    with pytest.raises(ValueError, match="length must be on cuda:0 where scores is; got cpu"):
        ops.select_tokens(**{**GOOD, "scores": GOOD["scores"].cuda()})


def test_a_negative_size_is_refused_on_meta():
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in GOOD.items()}
    with pytest.raises(ValueError, match=r"^uncomp::select_tokens: total_keep must not be negative; got -1$"):
        ops.select_tokens(**{**on_meta, "total_keep": -1})


def test_gradients_are_refused():
    with pytest.raises(NotImplementedError, match="inference only"):
        ops.select_tokens(**{**GOOD, "scores": torch.zeros(2, 9, requires_grad=True)})


def test_the_bound_function_is_the_operator():
    for got, want in zip(_extension._C.select_tokens(**GOOD), ops.select_tokens(**GOOD), strict=True):
        assert torch.equal(got, want)


# ---- opcheck
def test_opcheck(device):
    args = [v.to(device) if isinstance(v, torch.Tensor) else v for v in GOOD.values()]
    opcheck("select_tokens", *args, 3, "avg")


# ---- compile
def test_compile_fullgraph(device):
    scores = columns("uniform", 2, 40).to(device)
    length, keep = int32([40, 30], device), int32([12, 9], device)

    def step(x):
        index, row_start = ops.select_tokens(x * 2, length, keep, 21, sink=1, window=4, pool=3)
        return index + 1, row_start

    index, row_start = torch.compile(step, fullgraph=True)(scores)
    want_index, want_start = step(scores)
    assert torch.equal(index, want_index)
    assert torch.equal(row_start, want_start)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "count"), [(8, 32768), (300, 2000), (2, 450_000)])
def test_graph_replay_follows_scores_and_lengths(rows, count):
    scores = columns("uniform", rows, count).cuda()
    length, keep = int32([count] * rows, "cuda"), int32([count // 20] * rows, "cuda")
    total = count // 20 * rows
    options = {"sink": 2, "window": 8, "pool": 7}
    replay, (index, row_start) = capture_graph(lambda: ops.select_tokens(scores, length, keep, total, **options))
    for seed in range(3):
        scores.copy_(columns("bf16", rows, count, seed))
        length.fill_(count - 100 * seed)
        replay()
        want = ops.select_tokens(scores.cpu(), length.cpu(), keep.cpu(), total, **options)
        assert torch.equal(index.cpu(), want[0])
        assert torch.equal(row_start.cpu(), want[1])


def test_the_number_of_threads_changes_no_bit():
    scores, length, keep = columns("ties at the cut", 23, 1000), int32(range(0, 1012, 44)), int32([150] * 23)
    options = dict(sink=2, window=8, pool=7)
    assert_same_bits_for_threads(lambda: ops.select_tokens(scores, length, keep, 3000, **options))


@pytest.mark.gpu
def test_many_launches_on_two_streams_give_the_same_bits():
    scores = columns("ties at the cut", 8, 20_000).cuda()
    length, keep = int32([20_000] * 8, "cuda"), int32([1552] * 8, "cuda")
    first = ops.select_tokens(scores, length, keep, 8 * 1552, sink=0, window=8, pool=7)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    faults = []
    for i in range(1000):
        with torch.cuda.stream(streams[i % 2]):
            again = ops.select_tokens(scores, length, keep, 8 * 1552, sink=0, window=8, pool=7)
            if i % 10 < 2:
                faults.append((again[0] != first[0]).sum() + (again[1] != first[1]).sum())
    torch.cuda.synchronize()
    assert sum(int(fault) for fault in faults) == 0
