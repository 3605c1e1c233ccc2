# SPDX-License-Identifier: Apache-2.0
"""decode_attention over latents: what attention over the keys gives, which are never stored."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from key_transform_support import DTYPES, LSE_OF_MADE_KEYS, example
from reference.decode_attention import decode_attention as reference
from reference.key_transform import make_arena_keys
from support import assert_same_bits_for_threads, capture_graph

from uncomp import ops
from uncomp.ops import KeyTransform
from uncomp.testing import ATTENTION_FLOOR, relative_error


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


# ---- values
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "group"), [(False, 4), (False, 1), (True, 4), (True, 8)])
def test_positions_that_follow_one_another(device, dtype, bias, group):
    """Rows so long that a block turns keys by a table, with gaps and a stretch where every third token was kept."""
    long = 900 if device == "cpu" else 150_000 if dtype != torch.float32 else 3000
    args, made = example(
        (long, 70), 1, group, rank=64, dim=128, value_dim=64, dtype=dtype, device=device, bias=bias, offset=1
    )
    position, begin = made["slot_position"], args[3][0].item()
    follow = torch.arange(long, dtype=torch.int32)
    follow[long // 3 :] += 41
    follow[long // 2 : long // 2 + 100] += 2 * torch.arange(100, dtype=torch.int32)
    follow[long // 2 + 100 :] += 200
    position[begin : begin + long] = follow.to(device)
    check(args, made)


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


# ---- compile
def test_compile_fullgraph(device):
    args, made = example(device=device)

    def call(*a):
        return ops.decode_attention(*a, **made)[0] * 2

    assert torch.equal(torch.compile(call, fullgraph=True)(*args), call(*args))
