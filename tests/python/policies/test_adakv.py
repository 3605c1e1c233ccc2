# SPDX-License-Identifier: Apache-2.0
"""adakv: limits from the layer's best scores, exact to the token, and SnapKV's tokens inside them."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from policy_support import Run, by_row, chosen, pooled, shape_of, weights

from uncomp import UncompConfig
from uncomp.budget import clipped_shares
from uncomp.policies import make_policy


def limits(scores, n, b, window, alpha, form):
    """scores: [rows][n - window] pooled."""
    rows, spare = len(scores), b - window
    order = sorted((-s, row, j) for row, line in enumerate(scores) for j, s in enumerate(line))
    hits = [0] * rows
    if form == "protect":
        least = int(alpha * spare)
        safe = {
            (row, j) for row, line in enumerate(scores) for _, j in sorted((-s, j) for j, s in enumerate(line))[:least]
        }
        hits = [least] * rows
        rest = [x for x in order if x[1:] not in safe]
        for _, row, _ in rest[: rows * spare - rows * least]:
            hits[row] += 1
        return [window + f for f in hits]
    for _, row, _ in order[: rows * spare]:
        hits[row] += 1
    line = [alpha * spare + (1 - alpha) * f for f in hits]
    whole = [int(x) for x in line]
    for row in sorted(range(rows), key=lambda i: (whole[i] - line[i], i))[: rows * spare - sum(whole)]:
        whole[row] += 1
    return [window + x for x in whole]


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
@pytest.mark.parametrize("form", ["blend", "protect"])
@pytest.mark.parametrize("alpha", [0.2, 0.55, 0, 1])
def test_limits_and_tokens(rows, form, alpha):
    config = UncompConfig(policy="adakv", budget=47, window=8, rows=rows, policy_options={"alpha": alpha, "form": form})
    shape, n = shape_of(config), 160
    run = Run(config, shape, [n])
    for layer in range(shape.num_layers):
        scores = by_row(weights(run.stories[0], layer, n)[:, -8:].sum(1), shape.rows)
        scores = [pooled(s[: n - 8], 7) for s in scores]
        want = limits(scores, n, 47, 8, Fraction(str(alpha)), form)
        assert run.layers[layer].limit.tolist() == [want] and sum(want) == 47 * shape.rows
        assert run.kept(layer) == [chosen(s, n, b, 8) for s, b in zip(scores, want, strict=True)]


def test_defaults():
    config = UncompConfig(policy="adakv")
    policy = make_policy(config, shape_of(config))
    assert (config.window, policy.alpha, policy.option["form"]) == (32, Fraction(1, 5), "blend")


def test_a_short_prompt_grows_evenly():
    config = UncompConfig(policy="adakv", budget=60, window=8)
    for n in (59, 20, 8, 3, 1):
        run = Run(config, shape_of(config), [n])
        assert all(layer.limit.tolist() == [[60] * 3] for layer in run.layers)


def test_equal_scores_go_to_the_lower_row():
    config = UncompConfig(policy="adakv", budget=20, window=8, policy_options={"alpha": 0.0})
    run = Run(
        config, shape_of(config), [100],
        change=lambda made: setattr(made, "score", lambda view: torch.ones(view.num_rows, view.columns)),
    )  # fmt: skip
    assert run.layers[0].limit.tolist() == [[8 + 36, 8, 8]]


def test_totals_hold_in_later_turns_where_rows_differ():
    config = UncompConfig(policy="adakv", budget=0.5, window=8, policy_options={"alpha": 0.9})
    run = Run(config, shape_of(config), [120, 50])
    for _ in range(3):
        run.turn([40, 30])
        for layer, held in enumerate(run.layers):
            assert held.limit.sum(1).tolist() == run.compressor.policy.totals(layer, run.seen)
            assert int(held.limit.min()) >= 8


def test_clipped_shares():
    """Against the same rule in fractions, one row at a time."""
    dice = random.Random(3)
    for _ in range(300):
        rows = dice.randrange(1, 7)
        weight = [dice.randrange(1, 40) for _ in range(rows)]
        most = [dice.randrange(0, 30) for _ in range(rows)]
        total = dice.randrange(0, sum(most) + 20)
        got = clipped_shares(torch.tensor([weight]), torch.tensor([most]), torch.tensor([[total]]))[0].tolist()
        assert sum(got) == total
        over = max(0, total - sum(most))
        full, left = set(), total - over
        while True:
            rest = left - sum(most[i] for i in full)
            free = [i for i in range(rows) if i not in full]
            reach = {i for i in free if Fraction(rest * weight[i], sum(weight[j] for j in free)) >= most[i]}
            if not reach:
                break
            full |= reach
        line = [
            Fraction(most[i]) if i in full else Fraction(rest * weight[i], sum(weight[j] for j in free))
            for i in range(rows)
        ]
        want = [int(x) for x in line]
        for i in sorted(free, key=lambda i: (want[i] - line[i], i))[: left - sum(want)]:
            want[i] += 1
        assert got == [w + over // rows + (i < over % rows) for i, w in enumerate(want)]


def test_options_are_checked():
    for options, text in (
        ({"alpha": 1.2}, r"alpha of adakv must lie in \[0, 1\]; got 1.2"),
        ({"alpha": True}, "alpha of adakv"),
        ({"alpha": 0.12345}, "at most three decimals; got 0.12345"),
        ({"form": "both"}, "form of adakv must be one of 'blend', 'protect'; got 'both'"),
    ):
        config = UncompConfig(policy="adakv", policy_options=options)
        with pytest.raises(ValueError, match=text):
            make_policy(config, shape_of(config))
