# SPDX-License-Identifier: Apache-2.0
"""The arguments of decode_evict_ as one object, and how a row of them looks to the reference."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields

import torch
from reference import decode_evict as reference
from reference.decode_evict import Row
from torch import Tensor

from uncomp import ops
from uncomp.testing import ATTENTION_FLOOR, LSE_TOLERANCE, make_arena, relative_error

CHANGED = ("row_len", "key_rows", "value_rows", "slot_position", "votes", "vote_sum", "vote_step", "order")
GARBAGE = 2**31 - 1
VOTE_TOLERANCE = 1e-5  # absolute, on a weight: fp32 logits and exponentials
TIE_TOLERANCE = 2.0**-16  # of a score: closer than this, rounding may choose either


def vote_bits(vote_window: int) -> int:
    """Fraction bits of a vote, as core/votes.h has it."""
    return 30 - (vote_window - 1).bit_length()


@dataclass
class State:
    """Everything that decode_evict_ changes, and row_start."""

    row_start: Tensor
    row_len: Tensor
    key_rows: Tensor
    value_rows: Tensor
    slot_position: Tensor
    votes: Tensor
    vote_sum: Tensor
    vote_step: Tensor
    order: Tensor

    def clone(self, device=None) -> State:
        return State(**{f.name: getattr(self, f.name).clone().to(device) for f in fields(self)})

    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def bounds(self, row: int) -> tuple[int, int, int]:
        """First slot, tokens and room of a row."""
        start, end = int(self.row_start[row]), int(self.row_start[row + 1])
        return start, int(self.row_len[row]), end - start

    def slots(self, row: int) -> list[int]:
        """Arena slots of a row's tokens in position order."""
        start, length, _ = self.bounds(row)
        return [start + i for i in self.order[start : start + length].tolist()]

    def row(self, row: int) -> Row:
        """The row as the reference sees it."""
        slots, window = torch.tensor(self.slots(row), dtype=torch.int64), self.votes.shape[0]
        ages = [(int(self.vote_step[row]) + i) % window for i in range(window)]
        votes = self.votes.cpu().double()[ages][:, slots] / 2.0 ** vote_bits(window)
        keys, values = self.key_rows.cpu().double(), self.value_rows.cpu().double()
        return Row(keys[slots], values[slots], self.slot_position.cpu()[slots].tolist(), votes)

    def assert_sound(self, row: int) -> None:
        """What holds after any number of steps."""
        start, length, room = self.bounds(row)
        assert 0 <= length <= room
        order = self.order[start : start + length].cpu()
        assert torch.equal(order.sort().values, torch.arange(length, dtype=torch.int32)), "order is no permutation"
        positions = self.slot_position.cpu()[torch.tensor(self.slots(row), dtype=torch.int64)].tolist()
        assert all(a < b for a, b in itertools.pairwise(positions)), "positions do not ascend in order"
        live = slice(start, start + length)
        assert torch.equal(self.vote_sum[live].cpu(), self.votes[:, live].cpu().sum(0, dtype=torch.int32))


def make_state(
    lengths: list[int],
    rooms: list[int],
    *,
    key_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    vote_window: int = 4,
    seed: int = 0,
    poison: bool = True,
) -> State:
    """Rows of random tokens in random slots with random votes; what must not be read holds NaN or absurd numbers."""
    arena = make_arena(
        lengths, rooms=rooms, key_dim=key_dim, value_dim=value_dim, dtype=dtype, seed=seed, poison=poison
    )
    generator = torch.Generator().manual_seed(seed + 1)
    capacity, bits = arena.key_rows.shape[0], vote_bits(vote_window)
    votes = torch.full((vote_window, capacity), GARBAGE if poison else 0, dtype=torch.int32)
    vote_sum = torch.full((capacity,), -GARBAGE if poison else 0, dtype=torch.int32)
    order = torch.full((capacity,), GARBAGE if poison else 0, dtype=torch.int32)
    position = arena.slot_position.clone()
    for row, length in enumerate(lengths):
        start = int(arena.row_start[row])
        live = slice(start, start + length)
        weights = torch.rand(vote_window, length, generator=generator) / max(length, 1)
        votes[:, live] = (weights * 2.0**bits).int()
        vote_sum[live] = votes[:, live].sum(0, dtype=torch.int32)
        order[live] = torch.randperm(length, generator=generator).int()
        position[start + order[live].long()] = arena.slot_position[live]
    return State(
        arena.row_start,
        arena.row_len,
        arena.key_rows,
        arena.value_rows,
        position,
        votes,
        vote_sum,
        torch.randint(0, vote_window, (len(lengths),), generator=generator, dtype=torch.int32),
        order,
    )


def make_token(
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    *,
    position: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value, position of one new token a sequence, as slices of larger tensors."""
    generator = torch.Generator().manual_seed(seed)
    value_dim = key_dim if value_dim is None else value_dim
    shapes = [(num_q_heads, key_dim), (num_kv_heads, key_dim), (num_kv_heads, value_dim)]
    made = [torch.randn(batch, 3, h, d, generator=generator).to(dtype)[:, 1:2].transpose(1, 2) for h, d in shapes]
    return (*made, torch.full((batch,), position, dtype=torch.int32))


def run(state: State, token: tuple[Tensor, ...], **options):
    """One step in place; moves the token to the state's device."""
    token = tuple(t if t.device == state.key_rows.device else t.to(state.key_rows.device) for t in token)
    return ops.decode_evict_(*token, *state.arguments(), **options)


def torch_attention(state: State, row: int, query, key, value, scale):
    """The same attention by plain torch in the same dtype, to know how far rounding alone goes."""
    start, length, _ = state.bounds(row)
    keys = torch.cat([state.key_rows[start : start + length], key[None]])
    values = torch.cat([state.value_rows[start : start + length], value[None]])
    return torch.softmax(scale * query @ keys.T, -1) @ values


def assert_step(before: State, after: State, token, out, lse, **options):
    """`after`, out and lse are one step of the method from `before`, for every row."""
    query, key, value, position = (t.cpu() for t in token)
    before, out, lse = before.clone("cpu"), out.cpu(), lse.cpu()
    num_rows, batch = before.row_len.shape[0], query.shape[0]
    rows = num_rows // batch
    group, per_kv = query.shape[1] // rows, rows // key.shape[1]
    for r in range(num_rows):
        b, i = divmod(r, rows)
        q, k, v = query[b, i * group : (i + 1) * group, 0], key[b, i // per_kv, 0], value[b, i // per_kv, 0]
        _, _, room = before.bounds(r)
        args = (before.row(r), q, k, v, int(position[b]), room)
        want = reference.step(*args, **options)
        got = after.row(r)
        if want.left is not None:
            # The token that really left must be as small as the smallest, up to rounding.
            gone = set(before.row(r).positions) - set(got.positions)
            assert len(gone) == 1
            left = before.row(r).positions.index(gone.pop())
            assert options["sink"] <= left < len(want.pooled)
            assert want.pooled[left] <= min(want.pooled[options["sink"] :]) + TIE_TOLERANCE
            want = reference.step(*args, **options, left=left)
        assert got.positions == want.row.positions
        assert torch.equal(got.keys, want.row.keys)
        assert torch.equal(got.values, want.row.values)
        if room == 0:
            assert not out[b, i * group : (i + 1) * group].any()
            assert (lse[b, i * group : (i + 1) * group] == -math.inf).all()
            continue
        torch.testing.assert_close(got.votes, want.row.votes, rtol=0, atol=VOTE_TOLERANCE)
        mine = out[b, i * group : (i + 1) * group, 0]
        plain = relative_error(torch_attention(before, r, q, k, v, options["scale"]), want.out)
        assert relative_error(mine, want.out) <= 2 * plain + ATTENTION_FLOOR[query.dtype]
        torch.testing.assert_close(lse[b, i * group : (i + 1) * group].double(), want.lse, rtol=0, atol=LSE_TOLERANCE)
        after.assert_sound(r)


def defaults(**kwargs):
    """Options of a step on small rows, some replaced."""
    return {"window": 2, "sink": 0, "pool": 3, "scale": 0.125, **kwargs}


def checked_step(device, state: State, token, **options):
    """Runs a step on the device and holds it against the reference; returns the new state."""
    after = state.clone(device)
    out, lse = run(after, token, **options)
    assert_step(state, after, token, out, lse, **options)
    return after


def vector_state(votes, columns, dtype, device) -> State:
    """Tokens 0 .. K-1 whose logit under query e_c is ln of columns[c], with the given votes, g = 1."""
    length = len(votes[0])
    state = make_state([length], [length], vote_window=len(votes), dtype=dtype)
    state.key_rows.zero_()
    for c, column in enumerate(columns):
        state.key_rows[:, c] = torch.tensor(column).log().to(dtype)
    bits = vote_bits(len(votes))
    state.votes.copy_((torch.tensor(votes).double() * 2**bits).round().int())
    state.vote_sum.copy_(state.votes.sum(0))
    state.order.copy_(torch.arange(length))
    state.slot_position.copy_(torch.arange(length))
    state.vote_step.zero_()
    return state.clone(device)


def vector_token(weights, channel, position, dtype):
    """A new token whose own weights under query e_0, e_1 are given; the query is e_channel."""
    query, key, value = (torch.zeros(1, 1, 1, 64, dtype=dtype) for _ in range(3))
    query[..., channel] = 1
    key[0, 0, 0, : len(weights)] = torch.tensor(weights).log().to(dtype)
    return query, key, value, torch.tensor([position], dtype=torch.int32)
