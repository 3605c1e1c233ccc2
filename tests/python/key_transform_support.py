# SPDX-License-Identifier: Apache-2.0
"""Transforms, latents and steps that the tests of keys made from latents share."""

import dataclasses

import torch
from evict_state import make_state, make_token
from reference.key_transform import make_arena_keys

from uncomp.ops import KeyTransform
from uncomp.testing import LSE_TOLERANCE, make_arena

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
