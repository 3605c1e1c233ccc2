# SPDX-License-Identifier: Apache-2.0
"""ragged_attention: several new tokens over ragged rows equal one softmax over past and new keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.ragged_attention import ragged_attention as reference
from support import capture_graph, opcheck

from uncomp import ops
from uncomp.testing import ATTENTION_FLOOR, LSE_TOLERANCE, make_arena, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NEW = ["none", "keys", "other"]


def example(
    device="cpu",
    lengths=(0, 5, 64, 130),
    batch=2,
    group=2,
    tokens=5,
    key_dim=64,
    value_dim=None,
    dtype=torch.float32,
    new="keys",
    kv_heads=None,
    seed=0,
):
    """Positional arguments and options of one call; dead slots are NaN."""
    value_dim = key_dim if value_dim is None else value_dim
    rooms = [n + 3 for n in lengths]
    arena = make_arena(
        list(lengths), rooms=rooms, key_dim=key_dim, value_dim=value_dim, dtype=dtype, device=device, seed=seed
    )
    rows = len(lengths) // batch
    kv_heads = rows if kv_heads is None else kv_heads

    def random(*shape):
        return torch.randn(*shape).to(device, dtype)

    args = (
        random(batch, rows * group, tokens, key_dim),
        arena.key_rows,
        arena.value_rows,
        arena.row_start,
        arena.row_len,
        key_dim**-0.5,
    )
    if new == "keys":
        return args, {
            "key": random(batch, kv_heads, tokens, key_dim),
            "value": random(batch, kv_heads, tokens, value_dim),
        }
    if new == "other":
        lse = torch.randn(batch, rows * group, tokens, device=device) + 3
        lse[..., ::3] = -torch.inf
        return args, {"other_out": random(batch, rows * group, tokens, value_dim), "other_lse": lse}
    return args, {}


def plain_error(args, options, want):
    """How far plain torch, rounding at every step in the dtype of the query, is from the truth."""
    dtype = args[0].dtype
    if dtype == torch.float32:
        return 0.0
    out = torch.zeros_like(want)
    query, keys, values, start, length, scale = args
    rows = length.shape[0] // query.shape[0]
    group = query.shape[1] // rows
    for row, (begin, count) in enumerate(zip(start.tolist(), length.tolist(), strict=False)):
        mine = (row // rows, slice(row % rows * group, (row % rows + 1) * group))
        weights = (query[mine] @ keys[begin : begin + count].T * scale).softmax(-1)
        out[mine] = (weights @ values[begin : begin + count]).double().cpu() if count else 0
    past, _ = reference(*args, first=options.get("first"), length=options.get("length"))
    seen = past.abs().sum(-1) > 0
    return relative_error(out[seen], past[seen]) if seen.any() else 0.0


def check(args, options):
    out, lse = ops.ragged_attention(*args, **options)
    want, want_lse = reference(*args, **options)
    query, value_rows = args[0], args[2]
    assert out.shape == (*query.shape[:3], value_rows.shape[1])
    assert out.dtype == query.dtype
    assert lse.dtype == torch.float32
    if want.numel() and want.norm() > 0:
        assert relative_error(out, want) <= 2 * plain_error(args, options, want) + ATTENTION_FLOOR[query.dtype]
    else:
        assert torch.equal(out.cpu().double(), want)
    assert torch.allclose(lse.cpu().double(), want_lse, rtol=0, atol=LSE_TOLERANCE)
    return out, lse


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


# ---- values
def test_vector(device):
    """Past slot with logit 0, new tokens with logits ln 2 and ln 5: weights 1/3 2/3, then 1/8 2/8 5/8."""
    query = torch.zeros(1, 1, 2, 8, device=device)
    query[..., 0] = 1
    past, key = torch.zeros(1, 8, device=device), torch.zeros(1, 1, 2, 8, device=device)
    key[0, 0, :, 0] = torch.tensor([2.0, 5.0]).log()
    past_value, value = torch.full((1, 8), 24.0, device=device), torch.zeros(1, 1, 2, 8, device=device)
    value[0, 0, 1] = 8
    start, length = int32([0, 1], device), int32([1], device)
    out, lse = ops.ragged_attention(query, past, past_value, start, length, 1.0, key=key, value=value)
    assert torch.allclose(out[0, 0].cpu(), torch.tensor([[8.0], [8.0]]).expand(2, 8), atol=1e-5)
    assert torch.allclose(lse.cpu().flatten(), torch.tensor([3.0, 8.0]).log(), atol=1e-6)


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (256, 256), (96, 40)])
def test_head_dims(device, dtype, dims, new):
    check(*example(device, lengths=(5, 70), batch=1, key_dim=dims[0], value_dim=dims[1], dtype=dtype, new=new))


@pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_sizes(device, group, dtype):
    check(*example(device, lengths=(0, 1, 66), batch=3, group=group, tokens=9, dtype=dtype))


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 31, 33])
def test_token_counts_and_borders(device, dtype, tokens, new):
    check(*example(device, lengths=(0, 63, 64, 65), batch=1, tokens=tokens, dtype=dtype, new=new))


@pytest.mark.gpu
@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "batch", "tokens"), [((9000, 3, 0, 5000), 1, 3), ((200, 1500), 2, 150), ((70,) * 64, 16, 20)]
)
def test_larger_shapes(dtype, lengths, batch, tokens, new):
    check(*example("cuda", lengths=lengths, batch=batch, tokens=tokens, key_dim=128, dtype=dtype, new=new))


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_on_both_sides(device, dtype, new):
    """Valid tokens in the middle, none at all, one, all: the others give 0 and -inf and may hold NaN."""
    args, options = example(device, lengths=(3, 70, 0, 5), batch=4, tokens=7, dtype=dtype, new=new)
    first, length = [2, 7, 6, 0], [3, 0, 1, 7]
    for b in range(4):
        valid = torch.zeros(7, dtype=torch.bool)
        valid[first[b] : first[b] + length[b]] = True
        for t in (args[0], *options.values()):
            t[b][:, ~valid.to(t.device)] = float("nan")
    out, lse = check(args, options | {"first": int32(first, device), "length": int32(length, device)})
    assert torch.equal(out[1].cpu(), torch.zeros_like(out[1].cpu()))
    assert (lse[1] == -torch.inf).all()


def test_one_token_equals_decode_attention(device):
    for dtype in DTYPES:
        args, _ = example(device, lengths=(0, 5, 64, 1000), tokens=1, dtype=dtype, new="none")
        out, lse = ops.ragged_attention(*args)
        want, want_lse = ops.decode_attention(*args)
        tolerance = 3 * ATTENTION_FLOOR[dtype]
        assert torch.allclose(out.float(), want.float(), rtol=tolerance, atol=tolerance)
        assert torch.allclose(lse[:, :, 0], want_lse, rtol=0, atol=LSE_TOLERANCE)


def test_without_a_past_it_is_plain_causal_attention(device):
    args, options = example(device, lengths=(0, 0), batch=1, group=3, tokens=70)
    out, _ = ops.ragged_attention(*args, **options)
    keys, values = (options[name].repeat_interleave(3, 1) for name in ("key", "value"))
    want = torch.nn.functional.scaled_dot_product_attention(args[0], keys, values, is_causal=True)
    assert torch.allclose(out, want, atol=1e-5)


def test_chunks_of_any_size_equal_one_prefill(device):
    """Append after each chunk; nothing is evicted, so the outputs are those of one causal attention."""
    tokens, dim = 40, 64
    query, key, value = (torch.randn(1, heads, tokens, dim, device=device) for heads in (4, 2, 2))
    keys, values = (x.repeat_interleave(2, 1) for x in (key, value))
    want = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
    for chunk in (1, 7, 16, 40):
        rows = torch.full((2, 2, tokens, dim), float("nan"), device=device)
        start = int32([0, tokens, 2 * tokens], device)
        for begin in range(0, tokens, chunk):
            part = slice(begin, begin + chunk)
            out, _ = ops.ragged_attention(
                query[:, :, part],
                rows[0].view(-1, dim),
                rows[1].view(-1, dim),
                start,
                int32([begin, begin], device),
                dim**-0.5,
                key=key[:, :, part],
                value=value[:, :, part],
            )
            assert torch.allclose(out, want[:, :, part], atol=1e-5)
            rows[0][:, part], rows[1][:, part] = key[0, :, part], value[0, :, part]


def test_new_part_from_torch_joins(device):
    """other_out and other_lse from a causal attention over the new tokens give what key and value give."""
    args, options = example(device, lengths=(9, 130), batch=1, tokens=20)
    want, want_lse = ops.ragged_attention(*args, **options)
    nothing = int32([0, 0], device)
    new_out, new_lse = ops.ragged_attention(*args[:4], nothing, args[5], **options)
    strided = new_out.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = ops.ragged_attention(*args, other_out=strided, other_lse=new_lse)
    assert torch.allclose(out, want, atol=1e-5)
    assert torch.allclose(lse, want_lse, atol=1e-5)


def test_rows_of_query_heads(device):
    """rows="query_head": one row a query head, new key heads shared by several rows."""
    args, options = example(device, lengths=(4, 9, 70, 0, 3, 8, 65, 1), batch=2, group=1, tokens=6, kv_heads=2)
    check(args, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(device, dtype):
    """Queries, keys and values as slices of one fused [B, T, H, D] projection."""
    args, _ = example(device, tokens=6, dtype=dtype)
    fused = torch.randn(2, 6, 8, 64 + 16, device=device).to(dtype).transpose(1, 2)
    query, key, value = fused[:, :4, :, 8:72], fused[:, 4:6, :, 8:72], fused[:, 6:, :, 16:]
    check((query, *args[1:]), {"key": key, "value": value})
    check((fused[:, :4, :, 3:67], *args[1:]), {"key": key, "value": value})


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_calls(data):
    """Any shapes, padding and values: the contract's result, and a NaN or inf in a row touches no other row."""
    batch, rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    group, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 8))
    dim = 8 * data.draw(st.integers(1, 32))
    lengths = data.draw(st.lists(st.integers(0, 80), min_size=batch * rows, max_size=batch * rows))
    args, options = example(
        "cpu",
        lengths,
        batch,
        group,
        tokens,
        dim,
        data.draw(st.sampled_from([dim, 8, 72])),
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.sampled_from(NEW)),
        data.draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0])),
    )
    if data.draw(st.booleans()):
        first = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        length = [data.draw(st.integers(0, tokens - f)) for f in first]
        options |= {"first": int32(first, "cpu"), "length": int32(length, "cpu")}
    out, lse = check(args, options)
    hurt = data.draw(st.integers(0, batch * rows - 1))
    if lengths[hurt]:
        bad = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
        victim = args[1] if data.draw(st.booleans()) else args[2]
        victim[int(args[3][hurt]) + data.draw(st.integers(0, lengths[hurt] - 1)), data.draw(st.integers(0, 7))] = bad
        again, lse_again = ops.ragged_attention(*args, **options)
        kept = torch.ones(batch * rows, dtype=torch.bool)
        kept[hurt] = False
        by_row = (batch * rows, group * tokens)
        assert torch.equal(again.reshape(*by_row, args[2].shape[1])[kept], out.reshape(*by_row, args[2].shape[1])[kept])
        assert torch.equal(lse_again.reshape(by_row)[kept], lse.reshape(by_row)[kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("valid", [None, [1, 0]])
def test_one_new_token(device, dtype, kv_heads, valid):
    args, options = example(
        device, lengths=(0, 5, 64, 700, 3, 0, 9, 300), group=3, tokens=1, dtype=dtype, kv_heads=kv_heads, value_dim=40
    )
    if valid is not None:
        options["length"] = torch.tensor(valid, dtype=torch.int32, device=device)
        options["key"][1] = float("nan")
    check(args, options)


# ---- edges
def test_nothing_to_see_gives_zero_and_minus_infinity(device):
    for dtype in DTYPES:
        args, _ = example(device, lengths=(0, 0), batch=1, dtype=dtype, new="none")
        out, lse = ops.ragged_attention(*args)
        assert torch.equal(out.cpu(), torch.zeros(1, 4, 5, 64, dtype=dtype))
        assert torch.equal(lse.cpu(), torch.full((1, 4, 5), -torch.inf))


def test_no_tokens_and_no_sequences(device):
    args, options = example(device, tokens=0)
    out, lse = ops.ragged_attention(*args, **options)
    assert (out.shape, lse.shape) == ((2, 4, 0, 64), (2, 4, 0))
    zero, none = int32([0], device), int32([], device)
    rows = torch.zeros(0, 64, device=device)
    out, lse = ops.ragged_attention(torch.zeros(0, 4, 3, 64, device=device), rows, rows, zero, none, 1.0)
    assert (out.shape, lse.shape) == ((0, 4, 3, 64), (0, 4, 3))


def test_other_part_of_minus_infinity_is_not_read(device):
    """Where other_lse is -inf, other_out may hold anything; where the past is empty, the other part is the result."""
    args, options = example(device, lengths=(0, 70), batch=1, tokens=4, new="other")
    options["other_out"][..., 0, :] = float("nan")
    out, lse = check(args, options)
    assert torch.allclose(out[0, :2, 1:3], options["other_out"][0, :2, 1:3])
    assert torch.allclose(lse[0, :2, 1:3], options["other_lse"][0, :2, 1:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_live_key_stays_in_its_row(device, dtype):
    args, options = example(device, lengths=(9, 70, 100, 5), dtype=dtype)
    out, lse = ops.ragged_attention(*args, **options)
    args[1][int(args[3][2]) + 66, 5] = float("nan")
    hurt, hurt_lse = ops.ragged_attention(*args, **options)
    assert torch.equal(hurt[0], out[0])
    assert torch.equal(hurt[1, 2:], out[1, 2:])
    assert torch.equal(hurt_lse[1, 2:], lse[1, 2:])
    assert hurt[1, :2].isnan().all()
    assert hurt_lse[1, :2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_later_key_or_query_does_not_reach_earlier_tokens(device, dtype):
    args, options = example(device, lengths=(9, 70), batch=1, tokens=8, dtype=dtype)
    out, _ = ops.ragged_attention(*args, **options)
    options["key"][:, :, 5] = float("nan")
    hurt, lse = ops.ragged_attention(*args, **options)
    assert torch.equal(hurt[:, :, :5], out[:, :, :5])
    assert hurt[:, :, 5:].isnan().all()
    assert lse[:, :, 5:].isnan().all()


# ---- errors
def refused(kind, text, **changes):
    """A call of the example with some arguments changed, and how it is refused."""
    new = changes.pop("new", "keys")
    return pytest.param(new, changes, kind, text, id=text[:40])


@pytest.mark.parametrize(
    ("new", "changes", "kind", "text"),
    [
        refused(TypeError, "query must be float32, float16 or bfloat16; got float64", query=lambda q: q.double()),
        refused(ValueError, "query must have the head dim of key_rows, 64; got 56", query=lambda q: q[..., :56]),
        refused(NotImplementedError, "query must have at most 16 h", query=lambda q: q[:, :1].expand(2, 34, 5, 64)),
        refused(ValueError, "key and value must be given together; got only value", key=lambda k: None),
        refused(ValueError, "key and value must be given together; got only key", value=lambda v: None),
        refused(ValueError, "other_out and other_lse must be given together", new="other", other_lse=lambda x: None),
        refused(
            ValueError,
            "key and value must not be given with other_out and other_lse",
            other_out=lambda _: torch.zeros(2, 4, 5, 64),
            other_lse=lambda _: torch.zeros(2, 4, 5),
        ),
        refused(TypeError, r"key must have the dtype of query \(float32\); got float16", key=lambda k: k.half()),
        refused(ValueError, "key must have a number of heads that divides the 2", key=lambda k: k.repeat(1, 2, 1, 1)),
        refused(ValueError, r"key must have shape \[B, Hkv, T, Dk\] = \[2, 2, 5, 64\]", key=lambda k: k[:, :, :4]),
        refused(ValueError, r"value must have shape \[B, Hkv, T, Dv\]", value=lambda v: v[:, :1]),
        refused(ValueError, "value must be contiguous in its last dim", value=lambda v: v.mT.contiguous().mT),
        refused(
            ValueError,
            "value must have rows that start on 16-byte borders",
            value=lambda v: torch.cat([v.flatten()[:1], v.flatten()])[1:].view_as(v),
        ),
        refused(TypeError, "other_lse must be float32; got float64", new="other", other_lse=lambda x: x.double()),
        refused(ValueError, r"other_lse must have shape \[B, Hq, T\]", new="other", other_lse=lambda x: x[:, :, 1:]),
        refused(ValueError, r"other_out must have shape \[B, Hq, T, Dv\]", new="other", other_out=lambda x: x[:, 1:]),
        refused(TypeError, "first must be int32; got int64", first=lambda _: torch.zeros(2, dtype=torch.int64)),
        refused(ValueError, r"length must have shape \[B\] = \[2\]", length=lambda _: int32([1], "cpu")),
        refused(ValueError, r"first must lie in \[0, 5\]; got 6", first=lambda _: int32([6, 0], "cpu")),
        refused(
            ValueError,
            r"length must lie in \[0, T - first\]; got 3 for T - first = 2",
            first=lambda _: int32([0, 3], "cpu"),
            length=lambda _: int32([5, 3], "cpu"),
        ),
        refused(ValueError, r"row_len must lie in \[0, room\]; got 4 for row 0 with room 3", row_len=lambda n: n + 4),
        refused(ValueError, "row_start must ascend from 0", row_start=lambda s: s.flip(0)),
        refused(ValueError, "scale must be a finite number of float32; got inf", scale=lambda s: float("inf")),
        refused(ValueError, r"scale must be a finite number of float32; got -1e\+39", scale=lambda s: -1e39),
    ],
)
def test_errors_name_the_argument(new, changes, kind, text):
    args, options = example(new=new)
    names = ("query", "key_rows", "value_rows", "row_start", "row_len", "scale")
    given_args = dict(zip(names, args, strict=True)) | options
    for name, change in changes.items():
        given_args[name] = change(given_args.get(name))
    with pytest.raises(kind, match="uncomp::ragged_attention: " + text):
        ops.ragged_attention(**given_args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_outside_are_clamped(dtype):
    """Lengths and padding that lie read nothing outside the tensors."""
    args, options = example("cuda", lengths=(10, 20, 30, 40), dtype=dtype)
    query, keys, _, start, length, scale = args
    clean = torch.randn_like(keys)
    length[1], length[2] = 10**9, -5
    wild = {"first": int32([-3, 9], "cuda"), "length": int32([10**9, 2], "cuda")}
    out, lse = ops.ragged_attention(query, clean, clean, start, length, scale, **options, **wild)
    length[1], length[2] = 23, 0
    tame = {"first": int32([0, 5], "cuda"), "length": int32([5, 0], "cuda")}
    want, want_lse = ops.ragged_attention(query, clean, clean, start, length, scale, **options, **tame)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_gradients_are_refused():
    args, options = example()
    with pytest.raises(NotImplementedError, match="inference only"):
        ops.ragged_attention(args[0].requires_grad_(), *args[1:], **options)


# ---- opcheck
@pytest.mark.parametrize("new", NEW)
def test_opcheck(device, new):
    args, options = example(device, new=new)
    names = ("key", "value", "other_out", "other_lse", "first", "length")
    opcheck("ragged_attention", args[0], *(options.get(name) for name in names), *args[1:])


# ---- compile
def test_compile_fullgraph(device):
    args, options = example(device)
    compiled = torch.compile(lambda *a, **o: ops.ragged_attention(*a, **o)[0] * 2, fullgraph=True)
    assert torch.equal(compiled(*args, **options), ops.ragged_attention(*args, **options)[0] * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 100])
def test_graph_replay_follows_lengths_and_padding(tokens):
    args, options = example("cuda", lengths=(0, 100, 3000, 700), tokens=tokens, dtype=torch.bfloat16)
    query, keys, _, start, length, scale = args
    keys = torch.randn_like(keys)
    options |= {"first": int32([0, 0], "cuda"), "length": int32([tokens, tokens], "cuda")}
    args = (query, keys, keys, start, length, scale)
    replay, (out, lse) = capture_graph(lambda: ops.ragged_attention(*args, **options))
    for step in range(0, 100, 10):
        length.copy_(int32([0, step, 30 * step, 7 * step], "cuda"))
        options["first"].copy_(int32([step % tokens, 0], "cuda"))
        options["length"].copy_(int32([1, tokens - step % tokens], "cuda"))
        replay()
        want, want_lse = ops.ragged_attention(*args, **options)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 200])
def test_same_bits_every_time(dtype, tokens):
    args, options = example("cuda", lengths=(3000, 1, 1552, 400), tokens=tokens, key_dim=128, dtype=dtype)
    out, lse = ops.ragged_attention(*args, **options)
    for _ in range(20):
        again, lse_again = ops.ragged_attention(*args, **options)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)
