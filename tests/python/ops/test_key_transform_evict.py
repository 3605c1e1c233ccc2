# SPDX-License-Identifier: Apache-2.0
"""decode_evict_ over latents: the step over the keys, though what is stored of a token is its latent."""

import pytest
import torch
from evict_state import GARBAGE, defaults, run
from key_transform_support import DTYPES, LSE_OF_MADE_KEYS, evict_example, move
from reference.key_transform import make_arena_keys

from uncomp.ops import KeyTransform
from uncomp.testing import relative_error

OPTIONS = [{}, {"bias": True, "norm": True, "rotary": 32, "scale": 1.3}, {"offset": 2}]


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
