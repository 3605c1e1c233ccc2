# SPDX-License-Identifier: Apache-2.0
"""h2o: accumulated mass against whole attention matrices, in prompt, decoding and later turns."""

from __future__ import annotations

import pytest
import torch
from policy_support import SCALE, Run, best, shape_of, weights

from uncomp import UncompConfig
from uncomp.policies import make_policy


def reduced(heads, rows, reduce):
    return getattr(heads.view(rows, -1, *heads.shape[1:]), "amax" if reduce == "max" else reduce)(1)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
def test_prompt_and_thirty_steps(rows, reduce):
    config = UncompConfig(policy="h2o", budget=0.27, rows=rows, reduce_scores=reduce)
    shape = shape_of(config)
    run = Run(config, shape, [150, 100])
    plain = [[None] * shape.rows for _ in range(shape.num_layers)]  # row -> {position: mass}, first sequence
    b, n, story = 41, 150, run.stories[0]  # 0.27 * 150 = 40.5
    for layer in range(shape.num_layers):
        mass = reduced(weights(story, layer, n).sum(1), shape.rows, reduce)
        for row in range(shape.rows):
            kept = [*best(mass[row], b - b // 2, 0, n - b // 2), *range(n - b // 2, n)]
            assert run.kept(layer)[row] == kept
            plain[layer][row] = {p: float(mass[row][p]) for p in kept}
    for _ in range(30):
        now = run.seen[0]
        run.step()
        for layer in range(shape.num_layers):
            for row, held in enumerate(plain[layer]):
                index = [*held, now]
                group = shape.num_q_heads // shape.rows
                kv = row * shape.num_kv_heads // shape.rows
                query = story.query[layer, row * group : (row + 1) * group, now].double()
                share = (query @ story.key[layer, kv, index].double().T * SCALE).softmax(-1)
                for p, x in zip(index, reduced(share, 1, reduce)[0].tolist(), strict=True):
                    held[p] = held.get(p, 0.0) + x
                lost = min((p for p in held if p <= now - b // 2), key=lambda p: (held[p], p))
                del held[lost]
                assert sorted(run.kept(layer)[row]) == sorted(held)
    for layer in range(shape.num_layers):
        held = run.layers[layer]
        for row in range(shape.rows):
            start = int(held.row_start[row])
            got = dict(zip(held.slot_position[start : start + b].tolist(), held.mass[row, :b].tolist(), strict=True))
            assert all(abs(got[p] - x) < 1e-3 * max(1.0, x) for p, x in plain[layer][row].items())


def test_a_later_turn_counts_on():
    config = UncompConfig(policy="h2o", budget=200)
    run = Run(config, shape_of(config), [70])
    run.turn([90])  # nothing is dropped: the sums are those of one prompt
    mass = reduced(weights(run.stories[0], 2, 160).sum(1), 3, "mean")
    torch.testing.assert_close(run.layers[2].mass[:, :160].double(), mass, rtol=1e-3, atol=1e-3)


def test_pooling_is_refused():
    config = UncompConfig(policy="h2o", pool_width=7)
    with pytest.raises(ValueError, match="pool_width of h2o must be 1"):
        make_policy(config, shape_of(config))
