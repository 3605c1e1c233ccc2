# SPDX-License-Identifier: Apache-2.0
"""Several new tokens on compressed rows, against the method written out in float64, one row at a time."""

from __future__ import annotations

import math

import pytest
import torch

from uncomp import eviction, extension
from uncomp.compressor import Compressor
from uncomp.config import UncompConfig
from uncomp.policies import make_policy
from uncomp.types import CacheShape, Lengths
from uncomp.view import PromptView

BATCH, HEADS, KV_HEADS, DIM, PROMPT, WINDOW, BUDGET = 2, 4, 2, 64, 50, 8, 20
SCALE = 0.3


class Chunk:
    """New tokens of a turn, as the clock hands them on."""

    def __init__(self, lengths: Lengths, prior: list[int], voided: bool = False) -> None:
        self.lengths, self.prior, self.voided = lengths, prior, voided


def states(tokens: int, seed: int):
    """Random queries, keys, values of new tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(BATCH, h, tokens, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))


def compressor(rows: str = "kv_head", **options) -> Compressor:
    config = UncompConfig(policy="snapkv", budget=BUDGET, window=WINDOW, rows=rows, **options)
    shape = CacheShape(1, HEADS, KV_HEADS, DIM, HEADS if rows == "query_head" else KV_HEADS)
    return Compressor(config, shape, make_policy(config, shape))


def prefilled(made: Compressor, steps: int):
    """A compressed prompt of PROMPT tokens, and `steps` decode steps on it."""
    query, key, value = states(PROMPT, 1)
    view = PromptView(0, made.shape, made.config, query, key, value, Lengths([PROMPT] * BATCH, PROMPT), SCALE)
    (layer,) = made.compress([made.measure(view)])
    for step in range(steps):
        position = torch.full((BATCH,), PROMPT + step, dtype=torch.int32)
        layer.ensure_free(1)
        layer.count(1)
        eviction.decode_step(layer, made.config, *states(1, 100 + step), position, SCALE)
    return layer


def stored(layer, row: int):
    """Positions, keys, values of a row by position; and its votes, newest query first, as weights."""
    start, length = int(layer.row_start[row]), int(layer.row_len[row])
    position = layer.slot_position[start : start + length].long()
    order = position.argsort()
    rings, bits = layer.state.votes.shape[0], 30 - math.ceil(math.log2(layer.state.votes.shape[0]))
    newest = [int(layer.state.vote_step[row] - 1 - age) % rings for age in range(rings)]
    votes = layer.state.votes[newest, start : start + length].double() / 2**bits
    live = slice(start, start + length)
    return position[order], layer.key_rows[live][order], layer.value_rows[live][order], votes[:, order]


def pooled(scores: torch.Tensor, width: int = 7) -> torch.Tensor:
    half = width // 2
    return torch.stack([scores[max(0, j - half) : j + half + 1].max() for j in range(len(scores))])


def turn(layer, made: Compressor, tokens: int, seed: int, prior: int):
    """What the method says of a turn: outputs, kept positions of each row, and their votes."""
    query, key, value = states(tokens, seed)
    rows, group = made.shape.rows, HEADS // made.shape.rows
    out, kept, votes_kept = torch.zeros(BATCH, HEADS, tokens, DIM, dtype=torch.float64), [], []
    for row in range(BATCH * rows):
        sequence, head = divmod(row, rows)
        position, keys, values, votes = stored(layer, row)
        kv = head * KV_HEADS // rows
        position = torch.cat([position, torch.arange(prior, prior + tokens)])
        keys = torch.cat([keys, key[sequence, kv]]).double()
        values = torch.cat([values, value[sequence, kv]]).double()
        old, count = len(position) - tokens, len(position)
        weights = torch.zeros(group, tokens, count, dtype=torch.float64)
        for g in range(group):
            logits = SCALE * query[sequence, head * group + g].double() @ keys.T
            hidden = torch.arange(count) > old + torch.arange(tokens).unsqueeze(1)
            weights[g] = logits.masked_fill(hidden, -math.inf).softmax(-1)
            out[sequence, head * group + g] = weights[g] @ values
        mean = weights.mean(0)
        by_age = torch.zeros(max(WINDOW, votes.shape[0]), count, dtype=torch.float64)
        for age in range(len(by_age)):
            if age < tokens:
                by_age[age] = mean[tokens - 1 - age]
            elif age - tokens < len(votes):
                by_age[age, :old] = votes[age - tokens]
        scores = by_age[:WINDOW].sum(0)
        candidates = pooled(scores[: count - WINDOW])
        best = candidates.argsort(descending=True, stable=True)[: BUDGET - WINDOW]
        chosen = torch.cat([best.sort().values, torch.arange(count - WINDOW, count)])
        kept.append(position[chosen])
        votes_kept.append(by_age[: votes.shape[0]].sum(0)[chosen])
    return out, kept, votes_kept


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
@pytest.mark.parametrize("tokens", [2, 5, 8, 23])
@pytest.mark.parametrize("steps", [0, 3, 11])
def test_a_turn_follows_the_method(rows, tokens, steps):
    """Few new tokens leave older votes in the window; many push them out."""
    made = compressor(rows)
    layer = prefilled(made, steps)
    prior = PROMPT + steps
    want, kept, votes = turn(layer, made, tokens, 7, prior)
    chunk = Chunk(Lengths([tokens] * BATCH, tokens), [prior] * BATCH)
    out, taken = extension.extend(layer, made, 0, *states(tokens, 7), chunk, SCALE)
    (after,) = made.compress([taken])
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    for row, (positions, weight) in enumerate(zip(kept, votes, strict=True)):
        start, length = int(after.row_start[row]), int(after.row_len[row])
        assert after.slot_position[start : start + length].tolist() == positions.tolist(), row
        bits = 30 - math.ceil(math.log2(after.state.votes.shape[0]))
        got = after.state.vote_sum[start : start + length].double() / 2**bits
        torch.testing.assert_close(got, weight, atol=1e-5, rtol=0)
        rings = after.state.votes[:, start : start + length].sum(0)
        assert torch.equal(rings, after.state.vote_sum[start : start + length])
        assert sorted(after.state.order[start : start + length].tolist()) == list(range(length))
    assert after.capacity == BATCH * made.shape.rows * BUDGET


def test_a_turn_after_a_turn_keeps_counting():
    """The state that a turn leaves is the one the next turn starts from."""
    made = compressor()
    layer = prefilled(made, 4)
    prior = PROMPT + 4
    for seed, tokens in ((7, 3), (8, 2), (9, 12), (10, 4)):
        want, kept, _ = turn(layer, made, tokens, seed, prior)
        chunk = Chunk(Lengths([tokens] * BATCH, tokens), [prior] * BATCH)
        out, taken = extension.extend(layer, made, 0, *states(tokens, seed), chunk, SCALE)
        (layer,) = made.compress([taken])
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
        for row, positions in enumerate(kept):
            start = int(layer.row_start[row])
            assert layer.slot_position[start : start + BUDGET].tolist() == positions.tolist()
        prior += tokens


def test_voided_tokens_are_not_attended_and_not_kept():
    """A later mask takes back the last three decode steps of every sequence."""
    made = compressor()
    layer = prefilled(made, 5)
    prior = PROMPT + 2
    keep = layer.slot_position < prior
    want_rows = [
        layer.slot_position[s : s + n][keep[s : s + n]].sort().values
        for s, n in zip(layer.row_start.tolist(), layer.row_len.tolist(), strict=False)
    ]
    chunk = Chunk(Lengths([2] * BATCH, 2), [prior] * BATCH, voided=True)
    out, taken = extension.extend(layer, made, 0, *states(2, 7), chunk, SCALE)
    for row, positions in enumerate(want_rows):
        start, length = int(taken.view.arena.row_start[row]), int(taken.view.arena.row_len[row])
        got = taken.view.arena.slot_position[start : start + length].tolist()
        assert got == [*positions.tolist(), prior, prior + 1]
    assert out.isfinite().all()
