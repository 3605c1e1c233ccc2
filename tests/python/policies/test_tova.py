# SPDX-License-Identifier: Apache-2.0
"""tova: one set for a layer, by the newest query's weights."""

from __future__ import annotations

import pytest
import torch
from policy_support import SCALE, Run, chosen, shape_of, weights

from uncomp import UncompConfig
from uncomp.policies import make_policy


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
def test_prompt_and_thirty_steps(rows):
    config = UncompConfig(policy="tova", budget=40, rows=rows)
    assert config.window == 1
    shape, n = shape_of(config), 130
    run = Run(config, shape, [n])
    story, sets = run.stories[0], []
    for layer in range(shape.num_layers):
        sets.append(chosen(weights(story, layer, n)[:, -1].mean(0), n, 40, 1))
        assert run.kept(layer) == [sets[-1]] * shape.rows
    for _ in range(30):
        now = run.seen[0]
        run.step()
        for layer in range(shape.num_layers):
            index = [*sets[layer], now]
            key = story.key[layer, :, index].double().repeat_interleave(2, 0)
            share = ((key @ story.query[layer, :, now].double().unsqueeze(-1)).squeeze(-1) * SCALE).softmax(-1).mean(0)
            lost = min(range(40), key=lambda i: (float(share[i]), index[i]))
            sets[layer] = sorted(set(index) - {index[lost]})
            assert [sorted(kept) for kept in run.kept(layer)] == [sets[layer]] * shape.rows


def test_a_later_turn_keeps_one_set():
    config = UncompConfig(policy="tova", budget=40)
    run = Run(config, shape_of(config), [90, 60])
    run.turn([30, 7])
    for layer in range(3):
        kept = run.kept(layer)
        assert kept[0] == kept[1] == kept[2] and kept[3] == kept[4] == kept[5]
    assert torch.equal(run.layers[0].row_len, torch.full((6,), 40, dtype=torch.int32))


def test_pooling_is_refused():
    config = UncompConfig(policy="tova", pool_width=3)
    with pytest.raises(ValueError, match="pool_width of tova must be 1"):
        make_policy(config, shape_of(config))
