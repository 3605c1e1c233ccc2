# SPDX-License-Identifier: Apache-2.0
"""decode_attention and decode_evict_ over latents: what attention over the keys gives, which are never stored."""

import dataclasses

import pytest
import torch
from evict_state import GARBAGE, defaults, make_state, make_token, run
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.decode_attention import decode_attention as reference
from reference.key_transform import make_arena_keys
from support import assert_same_bits_for_threads, capture_graph, opcheck

from uncomp import ops
from uncomp.ops import KeyTransform
from uncomp.testing import ATTENTION_FLOOR, LSE_TOLERANCE, make_arena, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LSE_OF_MADE_KEYS = {torch.float32: 10 * LSE_TOLERANCE, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # keys are rounded


def make_transform(
    heads,
    rank,
    dim,
    dtype=torch.float32,
    *,
    bias=False,
    norm=False,
    rotary=None,
    offset=0,
    scale=1.0,
    seed=0,
    device="cpu",
):
    """Random; `offset` is the number of sequences that get one."""
    generator = torch.Generator().manual_seed(seed)
    rotary = dim if rotary is None else rotary
    half = rotary // 2
    return KeyTransform(
        (torch.randn(heads, rank, dim, generator=generator) * rank**-0.5).to(device, dtype),
        torch.randn(heads, dim, generator=generator).to(device) if bias else None,
        (torch.rand(dim, generator=generator) + 0.5).to(device) if norm else None,
        1e-5,
        (10000.0 ** (-torch.arange(half).float() / half)).to(device) if half else None,
        scale,
        torch.randint(0, 5000, (offset,), generator=generator, dtype=torch.int32).to(device) if offset else None,
    )


def example(
    lengths=(0, 5, 64, 200),
    batch=2,
    group=4,
    rank=32,
    dim=64,
    value_dim=48,
    heads=None,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    **options,
):
    arena = make_arena(
        list(lengths),
        rooms=[n + 3 for n in lengths],
        key_dim=rank,
        value_dim=value_dim,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    rows = len(lengths) // batch
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(batch, rows * group, 1, dim, generator=generator).to(device, dtype)
    transform = make_transform(heads or rows, rank, dim, dtype, device=device, seed=seed, **options)
    args = (query, arena.key_rows, arena.value_rows, arena.row_start, arena.row_len, dim**-0.5)
    return args, {"key_transform": transform, "slot_position": arena.slot_position}


def check(args, made):
    out, lse = ops.decode_attention(*args, **made)
    query, latents, values, start, length, scale = args
    keys = make_arena_keys(latents, made["slot_position"], start, length, query.shape[0], made["key_transform"])
    want, want_lse = reference(query, keys, values, start, length, scale)
    rounded, _ = reference(query, keys.to(query.dtype), values, start, length, scale)
    allowed = 3 * relative_error(rounded, want) + ATTENTION_FLOOR[query.dtype] if want.norm() > 0 else 0
    assert out.dtype == query.dtype
    assert (out.cpu().double() - want).norm() <= allowed * want.norm()
    assert torch.allclose(lse.cpu().double(), want_lse, rtol=0, atol=LSE_OF_MADE_KEYS[query.dtype])
    return out, lse


# ---- decode_attention
@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_is_attention_over_the_rows(device, dtype):
    """Full rank, nothing added, nothing turned: the keys are what is stored."""
    args, _ = example(rank=64, dim=64, value_dim=64, dtype=dtype, device=device)
    basis = torch.eye(64, device=device, dtype=dtype).repeat(2, 1, 1)
    out, lse = ops.decode_attention(*args, key_transform=KeyTransform(basis))
    want, want_lse = ops.decode_attention(*args)
    assert relative_error(out, want) <= (1e-6 if dtype == torch.float32 else 4e-3)
    assert torch.allclose(lse, want_lse, rtol=0, atol=1e-5)


def test_vector(device):
    """Latent (1, 2), basis rows e_0 and 2 e_1, bias on channel 0: key (1.5, 4); a quarter turn gives (-4, 1.5)."""
    basis = torch.zeros(1, 16, 16, device=device)
    basis[0, 0, 0], basis[0, 1, 1] = 1, 2
    bias = torch.zeros(1, 16, device=device)
    bias[0, 0] = 0.5
    latent = torch.zeros(1, 16, device=device)
    latent[0, :2] = torch.tensor([1.0, 2.0])
    frequency = torch.tensor([torch.pi / 2], device=device)
    ones, position = torch.ones(1, 16, device=device), torch.tensor([2], dtype=torch.int32, device=device)
    start, length = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([0, 1], [1]))
    for offset, want in ((-2, (1.5, 4.0)), (-1, (-4.0, 1.5)), (0, (-1.5, -4.0)), (1, (4.0, -1.5))):
        shift = torch.tensor([offset], dtype=torch.int32, device=device)
        made = KeyTransform(basis, bias, frequency=frequency, offset=shift)
        for channel in range(2):
            query = torch.zeros(1, 1, 1, 16, device=device)
            query[..., channel] = 1
            _, lse = ops.decode_attention(
                query, latent, ones, start, length, 1.0, key_transform=made, slot_position=position
            )
            assert lse.item() == pytest.approx(want[channel], abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"rotary": 0},
        {},
        {"bias": True},
        {"norm": True},
        {"rotary": 32, "scale": 1.3},
        {"rotary": 48},
        {"rotary": 2},
        {"offset": 2},
        {"bias": True, "norm": True, "rotary": 16, "offset": 2, "scale": 0.7},
    ],
    ids=str,
)
def test_each_part(device, dtype, options):
    check(*example(dtype=dtype, device=device, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rank", "dim", "value_dim"),
    [
        (16, 64, 64),
        (48, 64, 32),
        (64, 128, 64),
        (64, 128, 128),
        (80, 128, 96),
        (128, 128, 128),
        (32, 96, 40),
        (16, 80, 80),
        (64, 256, 256),
    ],
)
def test_widths(device, dtype, rank, dim, value_dim):
    check(*example((70, 40), 1, rank=rank, dim=dim, value_dim=value_dim, dtype=dtype, device=device, bias=True))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 9, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_sizes(device, dtype, group):
    check(*example((0, 1, 130), 3, group, dim=128, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(0, 1, 31, 32, 33, 63, 64, 65), (127, 128, 129, 15, 16, 17, 0, 0), (900, 1, 1, 2)])
def test_lengths(device, dtype, lengths):
    check(*example(lengths, rank=16, value_dim=16, dtype=dtype, device=device, offset=2))


def test_several_rows_of_a_kv_head(device):
    """rows="query_head": two rows of a sequence read the basis of one KV head."""
    check(*example((20, 21, 22, 23, 24, 25, 26, 27), 2, 1, heads=2, bias=True, device=device))


@pytest.mark.parametrize("position", [0, 1000, 131071, 2**24 + 1, 2**30 + 12345])
def test_angles_are_exact_far_out(device, position):
    """float32 would be wrong by 0.06 radians at a million tokens."""
    args, made = example((40,), 1, 1, rank=64, dim=64, device=device)
    made["slot_position"].fill_(position)
    made["key_transform"] = dataclasses.replace(
        made["key_transform"], basis=torch.eye(64, device=device)[None], frequency=torch.full((32,), 1.0, device=device)
    )
    args[0].copy_(args[1][3])
    _, lse = ops.decode_attention(*args, **made)
    keys = make_arena_keys(args[1], made["slot_position"], *args[3:5], 1, made["key_transform"])
    _, want = reference(args[0], keys, *args[2:])
    assert torch.allclose(lse.cpu().double(), want, rtol=0, atol=1e-5 if device == "cpu" or position < 2**17 else 2e-2)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_random_calls(data):
    batch, rows = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    dim = 8 * data.draw(st.integers(1, 16))
    lengths = data.draw(st.lists(st.integers(0, 60), min_size=batch * rows, max_size=batch * rows))
    flags = {name: data.draw(st.booleans()) for name in ("bias", "norm")}
    args, made = example(
        lengths,
        batch,
        data.draw(st.integers(1, 8)),
        8 * data.draw(st.integers(1, 9)),
        dim,
        8 * data.draw(st.integers(1, 9)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        seed=data.draw(st.integers(0, 99)),
        rotary=2 * data.draw(st.integers(0, dim // 2)),
        offset=batch * data.draw(st.integers(0, 1)),
        scale=data.draw(st.sampled_from([1.0, 1.2])),
        **flags,
    )
    out, _ = check(args, made)
    hurt = data.draw(st.integers(0, batch * rows - 1))
    if lengths[hurt]:
        args[1][int(args[3][hurt]) + data.draw(st.integers(0, lengths[hurt] - 1)), 3] = float("nan")
        again, lse_again = ops.decode_attention(*args, **made)
        shape, kept = (batch * rows, -1), torch.arange(batch * rows) != hurt
        assert torch.equal(again.reshape(shape)[kept], out.reshape(shape)[kept])
        assert again.reshape(shape)[hurt].isnan().all()
        assert lse_again.reshape(shape)[hurt].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype):
    args, made = example((3000, 3, 0, 700), group=3, dim=80, dtype=dtype, norm=True, bias=True)
    assert_same_bits_for_threads(lambda: ops.decode_attention(*args, **made))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "batch"), [((3000, 10, 10, 10), 1), ((1500,) * 8, 1), (tuple(range(0, 90)) * 2, 90)]
)
def test_rows_are_shared_by_many_workers(dtype, lengths, batch):
    check(*example(lengths, batch, 3, 64, 128, 64, dtype=dtype, device="cuda", bias=True, norm=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time_and_in_a_graph(dtype):
    args, made = example((9000, 1, 1552, 400), 2, 4, 64, 128, 64, dtype=dtype, device="cuda", bias=True)
    length = args[4].clone()
    replay, (out, lse) = capture_graph(lambda: ops.decode_attention(*args, **made))
    for step in range(100):
        args[4].copy_((length * (step % 10 + 1)) // 10)
        replay()
        want, want_lse = ops.decode_attention(*args, **made)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


# ---- decode_evict_
OPTIONS = [{}, {"bias": True, "norm": True, "rotary": 32, "scale": 1.3}, {"offset": 2}]


def evict_example(
    dtype,
    device="cpu",
    rank=32,
    dim=64,
    value_dim=48,
    group=4,
    heads=2,
    batch=2,
    seed=0,
    lengths=None,
    rooms=None,
    **options,
):
    """A state of latents with a new token, and the same with the keys of all of them."""
    rooms = rooms or [5, 70, 33, 129]
    lengths = lengths or [5, 70, 20, 0]
    state = make_state(lengths, rooms, key_dim=rank, value_dim=value_dim, dtype=dtype, seed=seed)
    rows = len(rooms) // batch
    _, latent, value, position = make_token(batch, 1, heads, rank, value_dim, position=1000, dtype=dtype, seed=seed)
    query = make_token(batch, rows * group, 1, dim, position=0, dtype=dtype, seed=seed + 1)[0]
    transform = make_transform(heads, rank, dim, dtype, seed=seed, **options)
    keys = make_arena_keys(state.key_rows, state.slot_position, state.row_start, state.row_len, batch, transform)
    at = dataclasses.replace(transform)
    new = make_arena_keys(
        latent.reshape(batch * heads, rank),
        position.repeat_interleave(heads),
        torch.arange(batch * heads + 1),
        torch.ones(batch * heads, dtype=torch.int64),
        batch,
        at,
    )
    dense = dataclasses.replace(state.clone(), key_rows=keys.float(), value_rows=state.value_rows.float())
    dense_token = (query.float(), new.view(batch, heads, 1, dim).float(), value.float(), position)
    return state.clone(device), (query, latent, value, position), move(transform, device), dense, dense_token


def move(transform, device):
    tensors = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}
    return KeyTransform(**{k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in tensors.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_is_that_of_the_keys(device, dtype, options):
    """Same output, votes and choice as the step over float32 keys; what is stored of the new token is its latent."""
    state, token, transform, dense, dense_token = evict_example(dtype, device, **options)
    before = state.clone("cpu")
    out, lse = run(state, token, key_transform=transform, **defaults())
    want, want_lse = run(dense, dense_token, **defaults())
    assert relative_error(out.float(), want) <= {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    assert torch.allclose(lse.cpu(), want_lse, rtol=0, atol=LSE_OF_MADE_KEYS[dtype])
    after = state.clone("cpu")
    assert torch.equal(after.row_len, dense.row_len)
    rows = after.row_len.shape[0] // 2
    for r in range(after.row_len.shape[0]):
        after.assert_sound(r)
        start, length, _ = after.bounds(r)
        live = slice(start, start + length)
        if dtype == torch.float32:
            assert torch.equal(after.slot_position[live], dense.slot_position[live])
            assert torch.equal(after.order[live], dense.order[live])
        new = (after.slot_position[live] == 1000).nonzero().item() + start
        latent = token[1][r // rows, r % rows // (rows // 2), 0]
        assert torch.equal(after.key_rows[new], latent)
        kept = [s for s in range(start, start + length) if s != new]
        assert torch.equal(after.key_rows[kept], before.key_rows[kept])
        assert (after.vote_sum[live] != GARBAGE).all()


def test_many_steps_are_those_of_the_keys(device):
    """Twenty tokens in, twenty out: the same tokens stay as with float32 keys."""
    state, _, transform, dense, _ = evict_example(torch.float32, device, offset=2, bias=True)
    for step in range(20):
        token = evict_example(torch.float32, seed=step, offset=2, bias=True)[1]
        latent = token[1]
        position = token[3] + step
        keys = make_arena_keys(
            latent.reshape(4, -1),
            position.repeat_interleave(2),
            torch.arange(5),
            torch.ones(4, dtype=torch.int64),
            2,
            move(transform, "cpu"),
        )
        out, _ = run(state, (token[0], latent, token[2], position), key_transform=transform, **defaults())
        want, _ = run(dense, (token[0], keys.view(2, 2, 1, -1).float(), token[2], position), **defaults())
        assert relative_error(out, want) <= 1e-5
    for r in range(4):
        assert state.row(r).positions == dense.row(r).positions


def test_a_step_of_the_identity_is_the_plain_step(device):
    state, token, _, _, _ = evict_example(torch.float32, device, rank=64, value_dim=64)
    plain = state.clone(device)
    made = KeyTransform(torch.eye(64, device=device).repeat(2, 1, 1))
    out, lse = run(state, token, key_transform=made, **defaults())
    want, want_lse = run(plain, token, **defaults())
    assert torch.allclose(out, want, rtol=0, atol=1e-5)
    assert torch.allclose(lse, want_lse, rtol=0, atol=1e-5)
    assert torch.equal(state.key_rows.nan_to_num(), plain.key_rows.nan_to_num())
    assert torch.equal(state.slot_position, plain.slot_position)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_long_step(dtype):
    """Rows of several slices and of all skews; the kernels of long rows."""
    rooms = [1552, 3100, 20, 5000]
    state, token, transform, dense, dense_token = evict_example(
        dtype, "cuda", 64, 128, 64, lengths=[1552, 3000, 20, 5000], rooms=rooms, bias=True
    )
    out, lse = run(state, token, key_transform=transform, **defaults())
    want, want_lse = run(dense, dense_token, **defaults())
    assert relative_error(out.float(), want) <= (5e-3 if dtype == torch.float16 else 3e-2)
    assert torch.allclose(lse.cpu(), want_lse, rtol=0, atol=LSE_OF_MADE_KEYS[dtype])


# ---- edges
def test_empty_rows_give_zero_and_minus_infinity(device):
    args, made = example((0, 0), 1, device=device, bias=True)
    out, lse = ops.decode_attention(*args, **made)
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_no_sequences(device):
    args, made = example((4,), 1, device=device)
    query, latents, values, _, _, scale = args
    none = torch.zeros(0, dtype=torch.int32, device=device)
    out, _ = ops.decode_attention(
        query[:0], latents, values, torch.zeros(1, dtype=torch.int32, device=device), none, scale, **made
    )
    assert out.shape == (0, 4, 1, 48)


def test_nan_in_the_bias_stays_in_its_head(device):
    args, made = example((9, 70, 8, 30), 1, 2, bias=True, device=device)
    out, _ = ops.decode_attention(*args, **made)
    made["key_transform"].bias[2, 5] = float("nan")
    hurt, _ = ops.decode_attention(*args, **made)
    assert torch.equal(hurt[0, [0, 1, 2, 3, 6, 7]], out[0, [0, 1, 2, 3, 6, 7]])
    assert hurt[0, 4:6].isnan().all()


# ---- errors
@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"basis": lambda b: b.half()}, TypeError, r"key_basis must have the dtype of query \(Float\); got Half"),
        ({"basis": lambda b: b[0]}, ValueError, r"key_basis must have shape \[Hkv, r, D\]; got \[32, 64\]"),
        (
            {"basis": lambda b: b[:, :16]},
            ValueError,
            r"key_basis must have shape \[Hkv, r, D\] = \[2, 32, 64\]; got \[2, 16, 64\]",
        ),
        (
            {"basis": lambda b: b.transpose(1, 2).contiguous().transpose(1, 2)},
            ValueError,
            "key_basis must be contiguous",
        ),
        (
            {"basis": lambda b: b[:1].repeat(3, 1, 1)},
            ValueError,
            "key_basis must have a number of heads that divides the 2 rows",
        ),
        ({"bias": lambda _: torch.zeros(2, 64).half()}, TypeError, "key_bias must be Float; got Half"),
        (
            {"bias": lambda _: torch.zeros(64)},
            ValueError,
            r"key_bias must have shape \[Hkv, D\] = \[2, 64\]; got \[64\]",
        ),
        ({"norm": lambda _: torch.zeros(32)}, ValueError, r"key_norm must have shape \[D\] = \[64\]; got \[32\]"),
        ({"norm_eps": lambda _: -1.0}, ValueError, "key_norm_eps must be a finite number of at least 0; got -1"),
        (
            {"frequency": lambda _: torch.zeros(33)},
            ValueError,
            "rotary_frequency must turn at most the 64 channels of query; got 66",
        ),
        ({"frequency": lambda f: f.double()}, TypeError, "rotary_frequency must be Float; got Double"),
        ({"frequency": lambda f: f * torch.inf}, ValueError, "rotary_frequency must be finite; got inf at place 0"),
        ({"rotary_scale": lambda _: float("nan")}, ValueError, "rotary_scale must be a finite number; got nan"),
        (
            {"offset": lambda _: torch.zeros(3, dtype=torch.int32)},
            ValueError,
            r"position_offset must have shape \[B\] = \[2\]; got \[3\]",
        ),
        ({"offset": lambda _: torch.zeros(2)}, TypeError, "position_offset must be Int; got Float"),
    ],
)
@pytest.mark.parametrize("op", ["decode_attention", "decode_evict_"])
def test_errors_name_the_argument(op, change, kind, text):
    if op == "decode_attention":
        args, made = example()
        transform = made["key_transform"]
    else:
        state, token, transform, _, _ = evict_example(torch.float32)
    transform = dataclasses.replace(transform, **{k: f(getattr(transform, k)) for k, f in change.items()})
    with pytest.raises(kind, match=f"uncomp::{op}: " + text):
        if op == "decode_attention":
            ops.decode_attention(*args, key_transform=transform, slot_position=made["slot_position"])
        else:
            run(state, token, key_transform=transform, **defaults())


def test_errors_of_one_operator():
    args, made = example()
    with pytest.raises(ValueError, match="decode_attention: slot_position must come with rotary_frequency; got None"):
        ops.decode_attention(*args, key_transform=made["key_transform"])
    with pytest.raises(ValueError, match=r"decode_attention: slot_position must have shape \[C\]"):
        ops.decode_attention(*args, key_transform=made["key_transform"], slot_position=made["slot_position"][1:])
    with pytest.raises(ValueError, match="decode_attention: key_bias must come with key_basis; got it alone"):
        torch.ops.uncomp.decode_attention(args[0][..., :32], *args[1:], key_bias=torch.zeros(2, 64))
    state, token, transform, _, _ = evict_example(torch.float32)
    one = dataclasses.replace(transform, basis=transform.basis[:1])
    with pytest.raises(ValueError, match="decode_evict_: key_basis must have the 2 heads of key; got 1"):
        run(state, token, key_transform=one, **defaults())


def test_nothing_is_written_when_a_frequency_is_refused():
    state, token, transform, _, _ = evict_example(torch.float32)
    before = state.clone()
    bad = dataclasses.replace(transform, frequency=transform.frequency * torch.nan)
    with pytest.raises(ValueError, match="rotary_frequency must be finite"):
        run(state, token, key_transform=bad, **defaults())
    for a, b in zip(state.arguments(), before.arguments(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


# ---- opcheck
def arguments(transform):
    return tuple(
        getattr(transform, name) for name in ("basis", "bias", "norm", "norm_eps", "frequency", "rotary_scale")
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    args, made = example(dtype=dtype, device=device, bias=True, norm=True, offset=2)
    k = made["key_transform"]
    opcheck("decode_attention", *args, *arguments(k), made["slot_position"], k.offset)
    state, token, k, _, _ = evict_example(dtype, device, bias=True, norm=True, offset=2)
    token = [t.to(device) for t in token]
    opcheck("decode_evict_", *token, *state.arguments(), 2, 0, 3, 0.125, "max", "mean", *arguments(k), k.offset)


# ---- compile
def test_compile_fullgraph(device):
    args, made = example(device=device)

    def call(*a):
        return ops.decode_attention(*a, **made)[0] * 2

    assert torch.equal(torch.compile(call, fullgraph=True)(*args), call(*args))
