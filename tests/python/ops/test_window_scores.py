# SPDX-License-Identifier: Apache-2.0
"""window_scores: the mass of the last W queries on every key, held to the paper's formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.window_scores import window_scores as reference
from support import assert_same_bits_for_threads, capture_graph, opcheck

from uncomp import ops
from uncomp.testing import LSE_TOLERANCE, MASS_TOLERANCE, SCORE_TOLERANCE, make_arena

A0 = [0.20, 0.05, 0.02, 0.03, 0.25, 0.10, 0.05, 0.06, 0.24, 0.0]
A1 = [0.15, 0.04, 0.03, 0.04, 0.22, 0.08, 0.12, 0.07, 0.10, 0.15]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def example(device="cpu", batch=2, kv_heads=2, group=2, window=8, tokens=40, dim=64, dtype=torch.float32, seed=0):
    """Query and key as transformers lays them out: [B, S, H, D] in memory, heads second in the view."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, window, kv_heads * group, dim, generator=generator).to(device, dtype).transpose(1, 2)
    key = torch.randn(batch, tokens, kv_heads, dim, generator=generator).to(device, dtype).transpose(1, 2)
    return query, key


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_close(got, want):
    """Scores within the tolerance of their row, lse within its own, NaN exactly where the reference has it."""
    (scores, lse), (scores64, lse64) = got, want
    scores, lse = scores.cpu().double(), lse.cpu().double()
    assert scores.shape == scores64.shape
    assert lse.shape == lse64.shape
    assert torch.equal(scores.isnan(), scores64.isnan())
    assert torch.equal(lse.isnan(), lse64.isnan())
    assert torch.equal(lse.isinf(), lse64.isinf())
    finite = lse64.isfinite()
    torch.testing.assert_close(lse[finite], lse64[finite], rtol=1e-6, atol=LSE_TOLERANCE)
    if scores64.numel():
        bound = SCORE_TOLERANCE * scores64.nan_to_num(0).amax(1, keepdim=True) + 1e-6
        assert bool(((scores - scores64).abs().nan_to_num(0) <= bound).all())


def check(query, key, scale, **options):
    """Calls the operator, holds it to the reference and returns its scores."""
    got = ops.window_scores(query, key, scale, **options)
    assert_close(got, reference(query, key, scale, **options))
    return got[0]


# ---- values
def test_worked_vector(device):
    key = torch.eye(10, 16, device=device)[None, None]
    query = torch.tensor([A0, A1], device=device).clamp_min(1e-30).log()
    query = torch.cat([query, torch.zeros(2, 6, device=device)], 1)[None, None]
    scores, lse = ops.window_scores(query, key, 1.0)
    want = torch.tensor([[0.35, 0.09, 0.05, 0.07, 0.47, 0.18, 0.17, 0.13, 0.34, 0.15]])
    torch.testing.assert_close(scores.cpu(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.cpu(), torch.zeros(1, 1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 7, 8, 33, 64])
def test_windows(device, dtype, window):
    check(*example(device, window=window, tokens=150, dtype=dtype), 0.125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 7, 16])
@pytest.mark.parametrize("reduce_group", ["mean", "sum", "max", "none"])
def test_groups(device, dtype, group, reduce_group):
    check(*example(device, group=group, window=9, dtype=dtype), 0.2, reduce_group=reduce_group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
def test_head_dims(device, dtype, dim):
    check(*example(device, dim=dim, dtype=dtype, tokens=70), dim**-0.5)


@pytest.mark.parametrize("tokens", [8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1025])
def test_token_borders(device, tokens):
    check(*example(device, batch=1, tokens=tokens, dtype=torch.bfloat16), 0.125)


@pytest.mark.parametrize("reduce_window", ["sum", "mean"])
@pytest.mark.parametrize("reduce_group", ["mean", "sum", "max", "none"])
def test_many_queries_in_several_chunks(device, reduce_window, reduce_group):
    query, key = example(device, batch=1, group=16, window=60, tokens=200, dim=128, dtype=torch.float16)
    check(query, key, 0.09, reduce_window=reduce_window, reduce_group=reduce_group)


def test_row_mass_is_the_number_of_queries(device):
    query, key = example(device, tokens=300, dtype=torch.bfloat16)
    mass = check(query, key, 0.125, reduce_group="sum").sum(1)
    torch.testing.assert_close(mass.cpu(), torch.full((4,), 16.0), rtol=MASS_TOLERANCE, atol=0)


def test_max_is_taken_after_the_window(device):
    # Head 0 puts both queries on key 0, head 1 one query on key 0 and one on key 1.
    far = 60.0
    query = torch.zeros(1, 2, 2, 8, device=device)
    query[0, :, 0, 0] = query[0, 0, 1, 0] = query[0, 1, 1, 1] = far
    key = torch.eye(4, 8, device=device)[None, None]
    scores, _ = ops.window_scores(query, key, 1.0, reduce_group="max")
    torch.testing.assert_close(scores.cpu(), torch.tensor([[2.0, 1.0, 0.0, 0.0]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_dim", [8, 72, 256])
@pytest.mark.parametrize("reduce_group", ["mean", "none"])
def test_value_norms(device, dtype, value_dim, reduce_group):
    query, key = example(device, tokens=50, dtype=dtype)
    value = torch.randn(2, 50, 2, value_dim, device=device).to(dtype).transpose(1, 2)
    check(query, key, 0.125, value=value, length=int32([50, 31], device), reduce_group=reduce_group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce_group", ["mean", "max"])
def test_arena_rows(device, dtype, reduce_group):
    lengths = [0, 1, 40, 700, 5, 64]
    arena = make_arena(lengths, rooms=[3, 1, 50, 700, 9, 600], value_dim=72, dtype=dtype, device=device)
    query, _ = example(device, batch=3, kv_heads=2, group=3, dtype=dtype)
    rows = {"row_start": arena.row_start, "row_len": arena.row_len, "reduce_group": reduce_group}
    check(query, arena.key_rows, 0.125, columns=720, **rows)
    check(query, arena.key_rows, 0.125, columns=33, value=arena.value_rows, **rows)


def test_arena_rows_of_query_heads(device):
    arena = make_arena([20, 3, 9, 30], device=device)
    query, _ = example(device, batch=2, kv_heads=2, group=1)
    rows = {"row_start": arena.row_start, "row_len": arena.row_len, "columns": 30}
    scores = check(query, arena.key_rows, 0.125, reduce_group="none", **rows)
    assert torch.equal(scores, check(query, arena.key_rows, 0.125, reduce_group="sum", **rows))


def test_arena_equals_dense(device):
    query, key = example(device, batch=2, kv_heads=2, group=4, tokens=77, dtype=torch.bfloat16)
    dense, _ = ops.window_scores(query, key, 0.125)
    start = int32([0, 77, 154, 231, 308], device)
    packed, _ = ops.window_scores(
        query, key.reshape(-1, 64), 0.125, row_start=start, row_len=int32([77] * 4, device), columns=77
    )
    torch.testing.assert_close(packed, dense, rtol=1e-5, atol=1e-6)


FLOATS = st.sampled_from([None, None, None, float("nan"), float("inf"), float("-inf"), 300.0])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_calls_hold_the_contract(data):
    draw = data.draw
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4, 7]))
    window, tokens = draw(st.sampled_from([1, 2, 8, 13])), draw(st.integers(1, 48))
    dim, dtype = draw(st.sampled_from([8, 24, 64])), draw(st.sampled_from(DTYPES))
    device = draw(st.sampled_from(["cpu", "cuda"])) if torch.cuda.is_available() else "cpu"
    query, key = example(device, batch, kv_heads, group, window, tokens, dim, dtype, draw(st.integers(0, 99)))
    options = {
        "reduce_window": draw(st.sampled_from(["sum", "mean"])),
        "reduce_group": draw(st.sampled_from(["mean", "sum", "max", "none"])),
    }
    first = [draw(st.integers(0, tokens)) for _ in range(batch)]
    options["first"] = int32(first, device)
    options["length"] = int32([draw(st.integers(0, tokens - f)) for f in first], device)
    odd = draw(FLOATS)
    if odd is not None:
        key = key.clone(memory_format=torch.preserve_format)
        key[
            draw(st.integers(0, batch - 1)), draw(st.integers(0, kv_heads - 1)), draw(st.integers(0, tokens - 1)), 0
        ] = odd
    if draw(st.booleans()):  # a slice of a wider tensor, in another memory order
        wide = torch.full((kv_heads, batch, tokens + 2, dim + 8), float("nan"), dtype=dtype, device=device)
        wide[:, :, 1:-1, :dim] = key.transpose(0, 1)
        key = wide[:, :, 1:-1, :dim].transpose(0, 1)
    scale = draw(st.sampled_from([0.125, 1.0, -0.3, 0.0]))
    check(query, key, scale, **options)


# ---- edges
def test_padding_may_hold_nan(device):
    query, key = example(device, batch=3, tokens=60, dtype=torch.float16)
    key = key.clone(memory_format=torch.preserve_format)
    first, length = [0, 45, 10], [60, 15, 20]
    for b in range(3):
        key[b, :, : first[b]] = float("nan")
        key[b, :, first[b] + length[b] :] = float("inf")
    scores = check(query, key, 0.125, first=int32(first, device), length=int32(length, device))
    assert bool(scores.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_fewer_tokens_than_queries(device, dtype):
    query, key = example(device, batch=4, tokens=12, dtype=dtype)
    query[0, :, :5] = float("nan")  # queries that do not exist may hold anything
    length = int32([3, 0, 1, 8], device)
    for reduce_window in ("sum", "mean"):
        scores = check(query, key, 0.125, length=length, reduce_window=reduce_window)
        assert torch.equal(scores[2:4].cpu(), torch.zeros(2, 12))


def test_nan_stays_in_its_head(device):
    query, key = example(device, batch=1, tokens=40)
    key = key.clone(memory_format=torch.preserve_format)
    key[0, 1, 17, 3] = float("nan")
    scores = check(query, key, 0.125)
    assert bool(scores[0].isfinite().all())
    assert bool(scores[1].isnan().all())


def test_a_nan_inside_the_window_spares_the_older_queries(device):
    query, key = example(device, batch=1, kv_heads=1, tokens=40)
    key = key.clone(memory_format=torch.preserve_format)
    key[0, 0, 38, 3] = float("nan")
    _, lse = ops.window_scores(query, key, 0.125)
    assert lse.isnan().cpu().tolist() == [[[False] * 6 + [True] * 2] * 2]


def test_one_dominating_and_equal_logits(device):
    query, key = example(device, batch=1, kv_heads=1, tokens=200, dtype=torch.bfloat16)
    equal = check(query, torch.zeros_like(key), 0.125)
    torch.testing.assert_close(equal[0, :192].cpu(), equal[0, :1].cpu().expand(192), rtol=1e-5, atol=0)
    strong = torch.zeros_like(key)
    strong[0, 0, 100] = 30 * torch.sign(query[0, 0, 0])
    check(query, strong, 1.0)


def test_nothing_to_score(device):
    query, key = example(device, tokens=0)
    scores, lse = ops.window_scores(query, key, 1.0)
    assert scores.shape == (4, 0)
    assert bool((lse == float("-inf")).all())
    query, key = example(device, batch=0)
    scores, lse = ops.window_scores(query, key, 1.0)
    assert scores.shape == (0, 40)
    assert lse.shape == (0, 4, 8)


@pytest.mark.gpu
def test_wild_lengths_on_the_device_stay_inside():
    query, key = example("cuda", batch=3, tokens=30, dtype=torch.float16)
    first, length = int32([-5, 20, 99], "cuda"), int32([100, 100, -3], "cuda")
    got = ops.window_scores(query, key, 0.125, first=first, length=length)
    assert_close(got, reference(query, key, 0.125, first=[0, 20, 30], length=[30, 10, 0]))
    ops.window_scores(
        query,
        key.reshape(-1, 64),
        0.125,
        row_start=int32([0, 50, 20, -9, 2**31 - 1, 40, 7], "cuda"),
        row_len=int32([2**31 - 1, 3, -1, 7, 9, 9], "cuda"),
        columns=40,
    )
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_input_same_bits(dtype):
    query, key = example("cuda", tokens=3000, group=4, window=32, dim=128, dtype=dtype)
    scores, lse = ops.window_scores(query, key, 0.09)
    for _ in range(3):
        again = ops.window_scores(query, key, 0.09)
        assert torch.equal(scores, again[0])
        assert torch.equal(lse, again[1])


@pytest.mark.parametrize("reduce_group", ["mean", "max"])
def test_a_cpu_row_longer_than_the_workspace(reduce_group):
    """16 heads, 64 queries: the weights of about 4000 keys are kept between the passes, the others are made again."""
    query, key = example(batch=1, kv_heads=2, group=16, window=64, tokens=4700, dim=8)
    check(query, key, 0.3, reduce_group=reduce_group)


def test_the_number_of_threads_changes_no_bit():
    query, key = example(batch=2, kv_heads=3, window=16, tokens=1500, dtype=torch.bfloat16)
    assert_same_bits_for_threads(lambda: ops.window_scores(query, key, 0.125))


# ---- errors
def arena_options(**changed):
    options = {"row_start": int32([0, 20, 40], "cpu"), "row_len": int32([20, 20], "cpu"), "columns": 20}
    return {**options, **changed}


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"columns": 3}, ValueError, "columns must be 0 for a dense key"),
        ({"reduce_window": "max"}, ValueError, 'reduce_window must be "mean" or "sum"; got "max"'),
        ({"reduce_group": "all"}, ValueError, 'reduce_group must be "mean", "sum", "max" or "none"; got "all"'),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
        ({"scale": 1e39}, ValueError, "scale must be a finite number"),
        ({"first": torch.zeros(2)}, TypeError, "first must be int32; got float32"),
        ({"length": int32([1, 2, 3], "cpu")}, ValueError, r"length must have shape \[B\] = \[2\]; got \[3\]"),
        ({"first": int32([0, 41], "cpu")}, ValueError, r"first must lie in \[0, 40\]; got 41 for sequence 1"),
        ({"length": int32([41, 0], "cpu")}, ValueError, r"length must lie in \[0, 40\] behind first; got 41"),
        ({"row_len": int32([1], "cpu")}, ValueError, "row_start and row_len must be given together; got only row_len"),
        ({"value": torch.zeros(2, 2, 39, 64)}, ValueError, "value must have the tokens of key"),
        ({"value": torch.zeros(2, 2, 40, 64).half()}, TypeError, "value must have the dtype of query"),
        (
            {"key": torch.zeros(2, 2, 40, 64).half()},
            TypeError,
            r"key must have the dtype of query \(float32\); got float16",
        ),
        ({"key": torch.zeros(2, 3, 40, 64)}, ValueError, "query must have a multiple of the 3 heads of key"),
        ({"key": torch.zeros(1, 2, 40, 64)}, ValueError, "key must have 2 sequences like query; got 1"),
        ({"key": torch.zeros(2, 2, 40, 32)}, ValueError, r"key must have the head dim of query \(64\); got 32"),
        ({"key": torch.zeros(2, 2, 64, 40).mT}, ValueError, "key must be contiguous in its last dimension"),
        ({"key": torch.zeros(40, 64)}, ValueError, r"key must have shape \[B, Hkv, S, D\]"),
        ({"query": torch.zeros(2, 4, 65, 64)}, NotImplementedError, "at most 64 window queries; got 65"),
        ({"query": torch.zeros(2, 4, 0, 64)}, ValueError, "at least one window query; got 0"),
        (
            {"query": torch.zeros(2, 4, 8, 60)},
            NotImplementedError,
            "query must have a head dim that is a multiple of 8",
        ),
        ({"query": torch.zeros(2, 34, 8, 64)}, NotImplementedError, "at most 16 heads for each row; got 17"),
        ({"query": torch.zeros(2, 4, 8, 64).double()}, TypeError, "query must be float32, float16 or bfloat16"),
    ],
)
def test_errors_of_a_dense_key(options, kind, text):
    query, key = example()
    call = {"query": query, "key": key, "scale": 1.0, **options}
    with pytest.raises(kind, match="uncomp::window_scores: .*" + text):
        ops.window_scores(**call)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        (arena_options(columns=0), ValueError, "columns must be at least 1 for an arena; got 0"),
        (arena_options(first=int32([0], "cpu")), ValueError, "first and length belong to a dense key"),
        (arena_options(reduce_group="none"), ValueError, "a row for each of the 4 query heads"),
        (arena_options(row_start=int32([0, 20], "cpu")), ValueError, r"row_start must have shape \[R \+ 1\]"),
        (arena_options(row_start=int32([20, 0, 40], "cpu")), ValueError, "row_start must ascend"),
        (arena_options(row_start=int32([0, 20, 41], "cpu")), ValueError, "row_start must ascend"),
        (arena_options(row_len=int32([21, 20], "cpu")), ValueError, r"row_len must lie in \[0, room\]; got 21"),
        (arena_options(row_len=int32([-1, 20], "cpu")), ValueError, r"row_len must lie in \[0, room\]; got -1"),
        (
            arena_options(row_start=int32([0, 1, 2, 3], "cpu"), row_len=int32([1] * 3, "cpu")),
            ValueError,
            "query must have a multiple of the 3 rows of a sequence as its heads; got 4",
        ),
    ],
)
def test_errors_of_an_arena(options, kind, text):
    query, _ = example(batch=1)
    with pytest.raises(kind, match="uncomp::window_scores: .*" + text):
        ops.window_scores(query, torch.zeros(40, 64), 1.0, **options)


@pytest.mark.gpu
def test_unaligned_rows_are_refused():
    query, key = example("cuda", dtype=torch.float16)
    wide = torch.zeros(2, 2, 40, 68, device="cuda", dtype=torch.float16)
    with pytest.raises(ValueError, match="key must have rows that start on 16-byte borders"):
        ops.window_scores(query, wide[..., :64], 1.0)
    with pytest.raises(ValueError, match="key must be on cuda:0 where query is; got cpu"):
        ops.window_scores(query, key.cpu(), 1.0)


# ---- opcheck
def test_opcheck_dense(device):
    query, key = example(device)
    ends = int32([1, 0], device), int32([30, 40], device)
    opcheck("window_scores", query, key, key, *ends, None, None, 0, 0.125, "mean", "none")


def test_opcheck_arena(device):
    arena = make_arena([20, 3, 9, 30], device=device)
    query, _ = example(device)
    opcheck(
        "window_scores",
        query,
        arena.key_rows,
        None,
        None,
        None,
        arena.row_start,
        arena.row_len,
        25,
        0.125,
        "sum",
        "max",
    )


# ---- compile
def test_compile_fullgraph(device):
    query, key = example(device)
    compiled = torch.compile(lambda q, k: ops.window_scores(q, k, 0.125)[0] * 2, fullgraph=True)
    torch.testing.assert_close(compiled(query, key), ops.window_scores(query, key, 0.125)[0] * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_replay_follows_keys_and_lengths(dtype):
    query, key = example("cuda", tokens=600, dtype=dtype)
    length = int32([600, 10], "cuda")
    replay, got = capture_graph(lambda: ops.window_scores(query, key, 0.125, length=length))
    key.copy_(key.flip(2))
    length.copy_(length.flip(0))
    replay()
    assert_close(got, reference(query, key, 0.125, length=length))
