# SPDX-License-Identifier: Apache-2.0
"""decode_attention: ragged rows give what exact attention gives on each row alone, and dead slots never matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.decode_attention import decode_attention as reference
from support import assert_same_bits_for_threads, capture_graph, opcheck

import uncomp
from uncomp import ops
from uncomp.testing import ATTENTION_FLOOR, LSE_TOLERANCE, make_arena, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def example(
    device="cpu", lengths=(0, 5, 64, 200), batch=2, group=4, key_dim=64, value_dim=None, dtype=torch.float32, seed=0
):
    arena = make_arena(
        list(lengths),
        rooms=[n + 3 for n in lengths],
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    query = torch.randn(batch, len(lengths) // batch * group, 1, key_dim).to(device, dtype)
    return query, arena.key_rows, arena.value_rows, arena.row_start, arena.row_len, key_dim**-0.5


def plain_torch(query, key_rows, value_rows, row_start, row_len, scale):
    """softmax(q k^T) v row by row in the dtype of the query: how far plain torch is from the truth."""
    batch, heads = query.shape[:2]
    out = query.new_zeros(batch, heads, 1, value_rows.shape[1])
    rows = row_len.shape[0] // batch
    group = heads // rows
    for row, (start, length) in enumerate(zip(row_start.tolist(), row_len.tolist(), strict=False)):
        if length:
            mine = (row // rows, slice(row % rows * group, (row % rows + 1) * group), 0)
            keys, values = key_rows[start : start + length], value_rows[start : start + length]
            out[mine] = (query[mine] @ keys.T * scale).softmax(-1) @ values
    return out


def check(args, lse_share=0.0):
    out, lse = ops.decode_attention(*args)
    want, want_lse = reference(*args)
    query, value_rows = args[0], args[2]
    assert out.shape == (*query.shape[:3], value_rows.shape[1])
    assert out.dtype == query.dtype
    assert lse.dtype == torch.float32
    if want.numel() and want.norm() > 0:
        allowed = 2 * relative_error(plain_torch(*args), want) + ATTENTION_FLOOR[query.dtype]
        assert relative_error(out, want) <= allowed
    else:
        assert torch.equal(out.cpu().double(), want)
    assert torch.allclose(lse.cpu().double(), want_lse, rtol=lse_share, atol=LSE_TOLERANCE)
    return out, lse


# ---- values
def test_vector(device):
    """Two slots with logits 0 and ln 3: weights 1/4 and 3/4, lse ln 4."""
    query = torch.zeros(1, 1, 1, 8, device=device)
    query[..., 0] = 1
    keys, values = torch.zeros(2, 8, device=device), torch.zeros(2, 8, device=device)
    keys[1, 0] = 2 * torch.log(torch.tensor(3.0))
    values[0, 0], values[1, 0], values[1, 7] = 4, 8, 1
    start = torch.tensor([0, 2], dtype=torch.int32, device=device)
    length = torch.tensor([2], dtype=torch.int32, device=device)
    out, lse = ops.decode_attention(query, keys, values, start, length, 0.5)
    assert torch.allclose(out.cpu().flatten(), torch.tensor([7.0, 0, 0, 0, 0, 0, 0, 0.75]), atol=1e-5)
    assert torch.allclose(lse.cpu(), torch.tensor([[4.0]]).log(), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 128), (128, 40)])
def test_head_dims(device, dtype, dims):
    check(example(device, key_dim=dims[0], value_dim=dims[1], dtype=dtype))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 9, 12, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_sizes(device, group, dtype):
    check(example(device, lengths=(0, 1, 130), batch=3, group=group, key_dim=128, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths",
    [(0, 1, 63, 64, 65, 127, 128, 129), (15, 16, 17, 31, 33, 47, 48, 49), (100,) * 4, (3000, 1, 1, 2), (1, 1, 1, 3000)],
)
def test_lengths(device, dtype, lengths):
    check(example(device, lengths=lengths, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "batch"),
    [((40000, 10, 10, 10), 1), ((5000,) * 8, 1), (tuple(range(0, 260)) * 4, 130), ((70000,), 1), ((64,) * 512, 64)],
)
def test_rows_are_shared_by_many_workers(dtype, lengths, batch):
    check(example("cuda", lengths=lengths, batch=batch, group=3, key_dim=128, dtype=dtype))


def test_strided_query(device):
    """The query of a projection is a [B, T, H, D] tensor seen as [B, H, T, D], cut from a fused projection."""
    _, *rest = example(device, dtype=torch.float16)
    fused = torch.randn(2, 1, 8, 200, device=device, dtype=torch.float16)
    query = fused.transpose(1, 2)[..., 3:67]
    check((query, *rest))


def test_arena_inside_a_larger_tensor(device):
    """Rows in the middle of a larger arena: what lies around them is poison."""
    query, keys, values, start, length, scale = example(device)
    around = torch.full((50, 64), float("nan"), device=device)
    keys, values = torch.cat([around, keys, around]), torch.cat([around, values, around])
    want = ops.decode_attention(query, keys[50:-50], values[50:-50], start, length, scale)
    got = check((query, keys, values, start + 50, length, scale))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_rows_of_query_heads(device):
    """rows="query_head": as many rows as query heads, a group of one."""
    check(example(device, lengths=tuple(range(20, 36)), batch=2, group=1))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_calls(data):
    """Any shapes, strides and values: the contract's result, and a row with NaN or inf touches no other row."""
    batch, rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    group, dim = data.draw(st.integers(1, 16)), 8 * data.draw(st.integers(1, 32))
    value_dim = data.draw(st.sampled_from([dim, 8, 72]))
    dtype = data.draw(st.sampled_from(DTYPES))
    lengths = data.draw(st.lists(st.integers(0, 140), min_size=batch * rows, max_size=batch * rows))
    args = example("cpu", lengths, batch, group, dim, value_dim, dtype, seed=data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        args = (args[0].transpose(1, 2).contiguous().transpose(1, 2), *args[1:])
    out, lse = check(args)
    hurt = data.draw(st.integers(0, batch * rows - 1))
    if lengths[hurt]:
        bad = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
        victim = args[1] if data.draw(st.booleans()) else args[2]
        victim[int(args[3][hurt]) + data.draw(st.integers(0, lengths[hurt] - 1)), data.draw(st.integers(0, 7))] = bad
        again, lse_again = ops.decode_attention(*args)
        kept = torch.ones(batch * rows, dtype=torch.bool)
        kept[hurt] = False
        shape = (batch * rows, group, -1)
        assert torch.equal(again.reshape(shape)[kept], out.reshape(shape)[kept])
        assert torch.equal(lse_again.reshape(shape)[kept], lse.reshape(shape)[kept])


# ---- edges
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_rows_give_zero_and_minus_infinity(device, dtype):
    out, lse = ops.decode_attention(*example(device, lengths=(0, 0), batch=1, dtype=dtype))
    assert torch.equal(out.cpu(), torch.zeros(1, 8, 1, 64, dtype=dtype))
    assert torch.equal(lse.cpu(), torch.full((1, 8), -torch.inf))


def test_no_sequences_and_no_slots(device):
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    rows = torch.zeros(0, 64, device=device)
    out, lse = ops.decode_attention(torch.zeros(0, 8, 1, 64, device=device), rows, rows, zero, empty, 1.0)
    assert (out.shape, lse.shape) == ((0, 8, 1, 64), (0, 8))
    two = torch.zeros(2, dtype=torch.int32, device=device)
    out, lse = ops.decode_attention(torch.ones(1, 8, 1, 64, device=device), rows, rows, two, zero, 1.0)
    assert torch.equal(out.cpu(), torch.zeros(1, 8, 1, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["key", "value"])
def test_nan_in_a_live_slot_stays_in_its_row(device, dtype, where):
    args = example(device, lengths=(9, 70, 300, 5), group=2, dtype=dtype)
    out, lse = ops.decode_attention(*args)
    args[1 if where == "key" else 2][int(args[3][2]) + 100, 5] = float("nan")
    hurt, hurt_lse = ops.decode_attention(*args)
    assert torch.equal(hurt[0], out[0])
    assert torch.equal(hurt[1, 2:], out[1, 2:])
    assert torch.equal(hurt_lse[1, 2:], lse[1, 2:])
    if where == "key":
        assert hurt[1, :2].isnan().all()
        assert hurt_lse[1, :2].isnan().all()
    else:
        assert hurt[1, :2, 0, 5].isnan().all()
        assert hurt[1, :2].isnan().sum() == 2
        assert torch.equal(hurt_lse, lse)


def test_nan_in_one_query_head_stays_there(device):
    args = example(device, lengths=(40, 70), batch=1, group=3, dtype=torch.bfloat16)
    out, _ = ops.decode_attention(*args)
    args[0][0, 4, 0, 1] = float("nan")
    hurt, lse = ops.decode_attention(*args)
    others = [0, 1, 2, 3, 5]
    assert torch.equal(hurt[0, others], out[0, others])
    assert hurt[0, 4].isnan().all()
    assert lse[0, 4].isnan()


def test_large_logits_do_not_overflow(device):
    """Logits of several hundred, where exp() overflows: one slot takes all the weight."""
    args = list(example(device, lengths=(50, 200), batch=1, dtype=torch.float32))
    args[-1] = 40.0
    check(args, lse_share=1e-6)  # fp32 itself is no finer


def test_scale_of_zero_is_the_mean(device):
    query, keys, values, start, length, _ = example(device, lengths=(7, 100), batch=1, group=2)
    out, lse = ops.decode_attention(query, keys, values, start, length, 0.0)
    begin = int(start[1])
    assert torch.allclose(out[0, 2, 0], values[begin : begin + 100].mean(0), atol=1e-5)
    assert torch.allclose(lse[0, 2].cpu(), torch.tensor(100.0).log())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype):
    args = example(lengths=(5000, 3, 0, 700), group=3, key_dim=80, dtype=dtype)
    assert_same_bits_for_threads(lambda: ops.decode_attention(*args))


def test_inference_mode(device):
    args = example(device)
    with torch.inference_mode():
        out, _ = ops.decode_attention(*args)
        ragged, _ = ops.decode_attention(*(x.clone() if isinstance(x, torch.Tensor) else x for x in args))
    assert torch.equal(out, ragged)


# ---- errors
def changed(index, value):
    args = list(example())
    args[index] = value(args[index])
    return args


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        (changed(0, lambda q: q.double()), TypeError, "query must be float32, float16 or bfloat16; got float64"),
        (changed(0, lambda q: q[0]), ValueError, r"query must have shape \[B, Hq, 1, Dk\]; got \[8, 1, 64\]"),
        (changed(0, lambda q: q.expand(2, 8, 2, 64)), ValueError, "query must hold one token"),
        (changed(0, lambda q: q[..., :56]), ValueError, "query must have the head dim of key_rows, 64; got 56"),
        (changed(0, lambda q: q[:, :7]), ValueError, "query must have a multiple of the 2 rows of a sequence as its h"),
        (changed(0, lambda q: q[:1].expand(3, 8, 1, 64)), ValueError, "row_len must have a multiple of the batch size"),
        (
            changed(0, lambda q: q[:, :1].expand(2, 34, 1, 64)),
            NotImplementedError,
            "query must have at most 16 heads for each row",
        ),
        (changed(1, lambda k: k.half()), TypeError, r"key_rows must have the dtype of query \(float32\); got float16"),
        (changed(2, lambda v: v[1:]), ValueError, "value_rows must have 281 slots like key_rows; got 280"),
        (changed(2, lambda v: v[:, :60].contiguous()), NotImplementedError, "value_rows must have a head dim that is"),
        (changed(2, lambda v: v[:, :32]), ValueError, "value_rows must be contiguous; got strides"),
        (changed(3, lambda s: s.long()), TypeError, "row_start must be int32; got int64"),
        (changed(3, lambda s: s[1:]), ValueError, r"row_start must have shape \[R \+ 1\] = \[5\]; got \[4\]"),
        (changed(3, lambda s: s.flip(0)), ValueError, "row_start must ascend from 0 or more to at most 281 slots"),
        (changed(3, lambda s: s + 1), ValueError, "row_start must ascend"),
        (changed(4, lambda n: n.float()), TypeError, "row_len must be int32; got float32"),
        (changed(4, lambda n: n + 4), ValueError, r"row_len must lie in \[0, room\]; got 4 for row 0 with room 3"),
        (changed(4, lambda n: n - 1), ValueError, r"row_len must lie in \[0, room\]; got -1 for row 0"),
        (changed(5, lambda s: float("nan")), ValueError, "scale must be a finite number of float32; got nan"),
        (changed(5, lambda s: 1e39), ValueError, r"scale must be a finite number of float32; got 1e\+39"),
    ],
)
def test_errors_name_the_argument(args, kind, text):
    with pytest.raises(kind, match="uncomp::decode_attention: " + text):
        ops.decode_attention(*args)


def test_rows_off_the_16_byte_border_are_refused():
    query, keys, values, start, length, scale = example(dtype=torch.float16)
    shifted = torch.cat([keys.flatten()[:1], keys.flatten()])[1:].view_as(keys)
    with pytest.raises(ValueError, match="key_rows must have rows that start on 16-byte borders"):
        ops.decode_attention(query, shifted, values, start, length, scale)


@pytest.mark.gpu
def test_layout_outside_the_arena_is_clamped():
    """A layout that lies reads nothing outside the arena: lengths end at the room, starts at the capacity."""
    query, keys, _, start, length, scale = example("cuda", lengths=(10, 20, 30, 40))
    clean = torch.randn_like(keys)
    length[1], length[2] = 10**9, -5
    out, lse = ops.decode_attention(query, clean, clean, start, length, scale)
    length[1], length[2] = 23, 0
    want, want_lse = ops.decode_attention(query, clean, clean, start, length, scale)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    start[-1] = 2**31 - 1
    start[0] = -7
    ops.decode_attention(query, clean, clean, start, length, scale)
    torch.cuda.synchronize()


def test_gradients_are_refused():
    with pytest.raises(NotImplementedError, match="inference only"):
        ops.decode_attention(*changed(0, lambda q: q.requires_grad_()))


# ---- opcheck
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    opcheck("decode_attention", *example(device, dtype=dtype))


def test_opcheck_equal_rows(device):
    opcheck("decode_attention", *example(device, lengths=(30,) * 4))


# ---- compile
def test_compile_fullgraph(device):
    args = example(device, lengths=(5, 6, 7, 200))
    compiled = torch.compile(lambda *a: ops.decode_attention(*a)[0] * 2, fullgraph=True)
    assert torch.equal(compiled(*args), ops.decode_attention(*args)[0] * 2)


@pytest.mark.gpu
def test_graph_replay_follows_growing_lengths():
    query, keys, values, start, length, scale = example("cuda", lengths=(0, 100, 3000, 700), dtype=torch.bfloat16)
    keys, values = torch.randn_like(keys), torch.randn_like(values)
    room = (start[1:] - start[:-1]).to(torch.int32)
    replay, (out, lse) = capture_graph(lambda: ops.decode_attention(query, keys, values, start, length, scale))
    for step in range(300):
        length.copy_(torch.minimum((torch.arange(4, device="cuda") * step * 5).to(torch.int32), room))
        replay()
        if step % 50 == 0:
            want, want_lse = ops.decode_attention(query, keys, values, start, length, scale)
            assert torch.equal(out, want)
            assert torch.equal(lse, want_lse)
    check((query, keys, values, start, length, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype):
    args = example("cuda", lengths=(9000, 1, 1552, 400), dtype=dtype, key_dim=128)
    out, lse = ops.decode_attention(*args)
    for _ in range(20):
        again, lse_again = ops.decode_attention(*args)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.gpu
def test_second_device_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    uncomp.warmup("cuda:1")
    args = example("cuda:1", lengths=(5, 64, 900, 2))
    assert ops.decode_attention(*args)[0].device == args[0].device
    check(args)
