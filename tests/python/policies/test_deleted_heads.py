# SPDX-License-Identifier: Apache-2.0
"""delete_heads: the lowest rows store nothing, the others share the total, decode copies a partner's output."""

from __future__ import annotations

import math
import re

import pytest
import torch
from policy_support import SCALE, Run, Story, by_row, chosen, pooled, shape_of, weights

from uncomp import UncompConfig
from uncomp.attention import dense_attention
from uncomp.calibration.profile import CalibrationRun, HeadProfile, ModelFacts
from uncomp.policies import make_policy
from uncomp.types import Lengths

every_rows = pytest.mark.parametrize("rows", ["kv_head", "query_head"])


def order_of(run, layer, b, n, rows):
    """Rows of a sequence, lowest entropy first, in float64."""
    entropy = []
    for states in run.stories[b].query[layer, :, :n].double():
        centred = states - states.mean(0)
        unit = centred / centred.norm(dim=1, keepdim=True)
        spectrum = torch.linalg.eigvalsh(unit.T @ unit / unit.norm() ** 2).flip(0)[:4].clamp(min=1e-30)
        entropy.append(float(-(spectrum * spectrum.log()).sum() / math.log(16)))
    entropy = by_row(torch.tensor(entropy), rows).tolist()
    return sorted(range(rows), key=lambda row: entropy[row])


def partner_of(run, layer, b, n, rows, row, kept):
    last = run.stories[b].key[layer, :, max(n - 8, 0) : n].double().flatten(1)
    last = last.repeat_interleave(rows // last.shape[0], 0)
    cosine = [round(float(torch.cosine_similarity(last[row], last[other], 0)), 12) for other in kept]
    return kept[cosine.index(max(cosine))]


@every_rows
@pytest.mark.parametrize("deleted", [1, 2])
@pytest.mark.parametrize("total", [True, False])
def test_what_is_stored_and_what_decode_gives(rows, deleted, total):
    config = UncompConfig(budget=48, rows=rows, delete_heads=deleted, delete_total=total)
    shape = shape_of(config)
    lengths, all_rows = [150, 90], shape.rows
    run = Run(config, shape, lengths)
    stay, expected = all_rows - deleted, []
    for layer, held in enumerate(run.layers):
        assert held.rows == stay and held.capacity == held.limit.sum()
        assert held.capacity == 2 * 48 * (all_rows if total else stay)  # true savings: nothing beside
        stored, tokens = held.stored().tolist(), run.kept(layer)
        rows_of = {}
        for b, n in enumerate(lengths):
            lowest = order_of(run, layer, b, n, all_rows)[:deleted]
            kept = [row for row in range(all_rows) if row not in lowest]
            assert held.kept[b].tolist() == kept and [stored[b][row] for row in lowest] == [0] * deleted
            limits = held.limit[b].tolist()
            assert max(limits) - min(limits) <= 1
            scores = by_row(weights(run.stories[b], layer, n)[:, -8:].sum(1), all_rows)
            for place, row in enumerate(kept):
                want = chosen(pooled(scores[row][: n - 8], 7), n, limits[place], 8)
                assert tokens[b * stay + place] == want
                rows_of[b, row] = want
            for row in lowest:
                rows_of[b, row] = partner_of(run, layer, b, n, all_rows, row, kept)
        expected.append(rows_of)
    seen, out = list(run.seen), run.step()
    for layer, rows_of in enumerate(expected):
        for b, story in enumerate(run.stories):
            group = shape.num_q_heads // all_rows
            for head in range(shape.num_q_heads):
                row = head // group
                if isinstance(rows_of[b, row], int):
                    row = rows_of[b, row]
                copied = row * group + head % group
                kv = copied * shape.num_kv_heads // shape.num_q_heads
                index = [*rows_of[b, row], seen[b]]
                logits = story.key[layer, kv, index].double() @ story.query[layer, copied, seen[b]].double() * SCALE
                want = logits.softmax(0) @ story.value[layer, kv, index].double()
                torch.testing.assert_close(out[layer][b, head, 0].double(), want, rtol=0, atol=2e-5)


@every_rows
@pytest.mark.parametrize("decode", ["evict", "grow"])
@pytest.mark.parametrize("extend", ["reselect", "append"])
@pytest.mark.parametrize("budget", [48, 0.4, 1.0])
def test_a_padded_batch_equals_its_sequences(rows, decode, extend, budget):
    config = UncompConfig(budget=budget, rows=rows, delete_heads=2, decode=decode, extend=extend)
    shape = shape_of(config)
    lengths, turn = [120, 61, 3], [70, 69, 66]
    batch = Run(config, shape, lengths)
    singles = [Run(config, shape, [n], [Story(i, shape)]) for i, n in enumerate(lengths)]

    def same(out=None, alone=None):
        for layer in range(shape.num_layers):
            parts = [sorted(kept) for run in singles for kept in run.kept(layer)]
            assert [sorted(kept) for kept in batch.kept(layer)] == parts
            assert batch.layers[layer].source.tolist() == [run.layers[layer].source[0].tolist() for run in singles]
            if out is not None:
                torch.testing.assert_close(out[layer], torch.cat([o[layer] for o in alone]), rtol=0, atol=1e-5)

    same()
    before = [layer.kept.clone() for layer in batch.layers]
    for _ in range(3):
        same(batch.step(), [run.step() for run in singles])
    batch.turn(turn)
    for run, count in zip(singles, turn, strict=True):
        run.turn([count])
    same()
    same(batch.step(), [run.step() for run in singles])
    assert all(torch.equal(a, layer.kept) for a, layer in zip(before, batch.layers, strict=True))


@pytest.mark.parametrize("budget", [48, 1.0])
def test_a_sequence_that_begins_in_a_later_chunk(budget):
    """Its rows are chosen then, and its first tokens attend with all heads."""
    config = UncompConfig(budget=budget, delete_heads=1)
    shape = shape_of(config)
    late, alone = Run(config, shape, [90, 0]), Run(config, shape, [70], [Story(1, shape)])
    states = [[s[-1:].nan_to_num(0.0) for s in late.columns(i, [0, 0], [70, 70])] for i in range(3)]
    out = late.turn([70, 70])
    for layer in range(shape.num_layers):
        want = dense_attention(*states[layer], Lengths([70], 70), SCALE)
        torch.testing.assert_close(out[layer][1:], want, rtol=0, atol=1e-5)
        assert late.layers[layer].source[1].tolist() == alone.layers[layer].source[0].tolist()
        if budget == 48:
            assert [sorted(k) for k in late.kept(layer)[2:]] == [sorted(k) for k in alone.kept(layer)]


def test_orders_move_the_deletion():
    def deleted(n=150, **fields):
        config = UncompConfig(budget=48, rows="query_head", delete_heads=2, **fields)
        run = Run(config, shape_of(config), [n])
        return [sorted({*range(6)} - set(layer.kept[0].tolist())) for layer in run.layers]

    run = Run(UncompConfig(budget=48, rows="query_head"), shape_of(UncompConfig(rows="query_head")), [150])
    ranked = [order_of(run, layer, 0, 150, 6) for layer in range(3)]
    assert deleted() == [sorted(rank[:2]) for rank in ranked]
    assert deleted(order="reverse") == [sorted(rank[-2:]) for rank in ranked]
    assert deleted(order="random", seed=4) == deleted(90, order="random", seed=4) != deleted()


def test_the_order_of_a_profile(tmp_path):
    def votes(rows):  # row 1 is lowest in two samples of three, row 0 in one
        table = [[0] * rows for _ in range(rows)]
        for sample in ([1, 0], [1, 2], [0, 1]):
            ranked = sample + [row for row in range(rows) if row not in sample]
            for rank, row in enumerate(ranked):
                table[row][rank] += 1
        return [table] * 3

    zeros = [[0.5] * 6] * 3
    HeadProfile(
        ModelFacts("tiny", 3, 6, 3, 16, "0" * 64),
        CalibrationRun(3, 64, 42, 4, "truncated", {"entropy": "mean"}, "0" * 64),
        zeros, zeros, [1 / 16] * 16, [1.0] * 3, {"kv_head": votes(3), "query_head": votes(6)},
    ).save(tmp_path / "p.json")  # fmt: skip
    for count, order, want in ((1, "ascending", [0, 2]), (2, "ascending", [2]), (1, "reverse", [0, 1])):
        config = UncompConfig(budget=48, profile=str(tmp_path / "p.json"), delete_heads=count, order=order)
        run = Run(config, shape_of(config), [100, 40])
        assert [layer.kept.tolist() for layer in run.layers] == [[want, want]] * 3
        assert run.layers[0].statistic is None


def test_sequences_change_places():
    config = UncompConfig(budget=48, delete_heads=1)
    run = Run(config, shape_of(config), [100, 100])
    layer = run.layers[0]
    kept, source = layer.kept.clone(), layer.source.clone()
    twin = layer.fork()
    layer.select(torch.tensor([1, 0]))
    assert torch.equal(layer.kept, kept.flip(0)) and torch.equal(layer.source, source.flip(0))
    assert torch.equal(twin.kept, kept) and twin.fits(layer)
    twin.copy_(layer)
    assert torch.equal(twin.source, source.flip(0))
    layer.select(torch.tensor([1, 1, 0]))
    assert layer.kept.shape == (3, 2) and layer.stored().shape == (3, 3)


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"delete_heads": 3}, "delete_heads must lie in [0, 2], a row stays; got 3"),
        ({"delete_heads": 1, "groups": 2}, "groups must be left out where delete_heads is given"),
        ({"delete_heads": 1, "group_scope": "model"}, "group_scope must be left out where delete_heads is given"),
        ({"delete_heads": 1, "shape": "g2"}, "shape must be left out where delete_heads is given"),
        ({"delete_heads": 1, "extreme": 12}, "extreme must be left out where delete_heads is given"),
    ],
)
def test_what_does_not_fit_is_refused(fields, text):
    config = UncompConfig(**fields)
    with pytest.raises(ValueError, match=re.escape(text)):
        make_policy(config, shape_of(config))


@pytest.mark.parametrize("wrong", [-1, True, 1.5, "2"])
def test_a_wrong_number_is_refused(wrong):
    with pytest.raises(ValueError, match="delete_heads must be an integer from 0 to 16383"):
        UncompConfig(delete_heads=wrong)
