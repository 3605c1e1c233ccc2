# SPDX-License-Identifier: Apache-2.0
"""uncomp's second allocator: group weights times how many of its layer's best tokens a row has."""

from __future__ import annotations

import pytest
import torch
from policy_support import Run, Story, chosen, pooled, shape_of, weights
from reference.allocate_budget import allocate

from uncomp import UncompConfig
from uncomp.budget import MAX_WEIGHT, group_weights
from uncomp.eval.runs import plan
from uncomp.grouping import labels
from uncomp.policies import make_policy
from uncomp.policies.compete import row_weights
from uncomp.types import PlanRequest

OPTION = {"allocator": "groups*layer_topk"}


def reference_hits(run, layer, n, b):
    """Hits of a layer's rows, and their pooled scores; largest query head, times the norm of the value."""
    rows, story = run.shape.rows, run.stories[0]
    scores = weights(story, layer, n)[:, -8:].sum(1).view(rows, -1, n).amax(1)
    value = story.value[layer, :, :n].double().norm(dim=-1).repeat_interleave(rows // run.shape.num_kv_heads, 0)
    lines = [pooled(s[: n - 8], 7) for s in scores * value]
    order = sorted((-s, row, j) for row, line in enumerate(lines) for j, s in enumerate(line))
    taken = [row for _, row, _ in order[: rows * (b - 8)]]
    return [taken.count(row) for row in range(rows)], lines


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_limits_and_tokens(rows, scope):
    options = {"group_scope": scope, "groups": 8 if scope == "model" else 3}
    config = UncompConfig(preset="tuned-hits", budget=48, rows=rows, **options)
    shape, n = shape_of(config), 160
    run = Run(config, shape, [n])
    found = [reference_hits(run, layer, n, 48) for layer in range(shape.num_layers)]
    each = [hits for hits, _ in found]
    entropy = [layer.statistic[0].tolist() for layer in run.layers]
    if scope == "model":
        each, entropy = ([[x for layer in lists for x in layer]] for lists in (each, entropy))
    want = []
    for hits, some in zip(each, entropy, strict=True):
        group = [0] * len(some)
        of_rank = labels(len(some), config.groups)
        for rank, row in enumerate(sorted(range(len(some)), key=lambda r: (some[r], r))):
            group[row] = of_rank[rank]
        table = group_weights(config.groups)
        mine = [max(1, table[g] * f) for g, f in zip(group, hits, strict=True)]
        want += allocate(mine, n, 48 * len(some), 8)
    got = [limit for layer in run.layers for limit in layer.limit[0].tolist()]
    assert got == want and sum(got) == 48 * shape.rows * shape.num_layers
    plain = Run(UncompConfig(preset="tuned", budget=48, rows=rows, **options), shape, [n])
    assert got != [limit for layer in plain.layers for limit in layer.limit[0].tolist()]
    for layer, (_, lines) in enumerate(found):
        mine = got[layer * shape.rows : (layer + 1) * shape.rows]
        assert run.kept(layer) == [chosen(line, n, limit, 8) for line, limit in zip(lines, mine, strict=True)]


def test_a_padded_batch_equals_its_sequences():
    config = UncompConfig(preset="tuned-hits", budget=0.4)
    shape, lengths = shape_of(config), [150, 61, 9, 3]
    batch = Run(config, shape, lengths)
    singles = [Run(config, shape, [n], [Story(i, shape)]) for i, n in enumerate(lengths)]
    for _ in range(2):
        for layer, held in enumerate(batch.layers):
            assert held.limit.tolist() == [run.layers[layer].limit[0].tolist() for run in singles]
            alone = [sorted(kept) for run in singles for kept in run.kept(layer)]
            assert [sorted(kept) for kept in batch.kept(layer)] == alone
        for run, count in zip([batch, *singles], [[70, 20, 66, 65], [70], [20], [66], [65]], strict=True):
            run.turn(count)
    assert sum(layer.limit.sum(1) for layer in batch.layers).tolist() == [
        sum(batch.compressor.policy.totals(layer, [n])[0] for layer in range(shape.num_layers)) for n in batch.seen
    ]


def test_a_prompt_without_candidates_weighs_by_groups_alone():
    plain, both = (UncompConfig(preset=name, budget=48) for name in ("tuned", "tuned-hits"))
    for n in (8, 3, 1):
        one, other = Run(plain, shape_of(plain), [n]), Run(both, shape_of(both), [n])
        assert [a.limit.tolist() for a in one.layers] == [b.limit.tolist() for b in other.layers]


def test_products_above_the_largest_weight_keep_their_order():
    config = UncompConfig(policy_options=OPTION, window=1, pool_width=1)
    scores = torch.zeros(3, 41)
    scores[0, :30], scores[1, :10], scores[2, :2] = 3.0, 2.0, 1.0
    request = PlanRequest(
        [0], [41], [3 * 15], None, [scores], [torch.full((3,), 41, dtype=torch.int32)], torch.device("cpu")
    )
    group = torch.tensor([[0, 1, 1]], dtype=torch.int32)
    assert row_weights(request, group, [3, 5], config, 3).tolist() == [[3 * 30, 5 * 10, 5 * 2]]
    large = row_weights(request, group, [MAX_WEIGHT, MAX_WEIGHT // 2], config, 3)[0].tolist()
    assert large == [MAX_WEIGHT, MAX_WEIGHT // 2 * 10 // 30, MAX_WEIGHT // 2 * 2 // 30]
    # A row without a hit
    scores[2] = -1.0
    scores[1, 10:12] = 2.0
    assert row_weights(request, group, [3, 5], config, 3).tolist() == [[90, 60, 1]]


def test_rows_of_weights_of_their_own():
    config = UncompConfig(budget=40, shape="entropy", policy_options=OPTION)
    run = Run(config, shape_of(config), [150, 90])
    assert all(layer.limit.sum(1).tolist() == [120, 120] for layer in run.layers)
    plain = Run(UncompConfig(budget=40, shape="entropy"), run.shape, [150, 90])
    assert any(not torch.equal(a.limit, b.limit) for a, b in zip(run.layers, plain.layers, strict=True))


def test_the_preset_and_its_refusals():
    tuned, hits = UncompConfig(preset="tuned"), UncompConfig(preset="tuned-hits")
    assert hits.policy_options == OPTION and tuned.policy_options == {}
    assert {**hits.to_dict(), "preset": "tuned", "policy_options": {}} == tuned.to_dict()
    assert UncompConfig.from_dict(hits.to_dict()) == hits
    assert UncompConfig(preset="tuned-hits", policy_options={"allocator": "groups"}).policy_options == {
        "allocator": "groups"
    }
    assert plan(["uncomp:preset=tuned-hits"], [0.05], ["aware"], seed=1)[0].config.policy_options == OPTION
    given = plan(["uncomp:options.allocator=groups*layer_topk"], [0.05], ["aware"], seed=1)[0]
    assert (
        given.config.policy_options == OPTION and given.name == "uncomp_options.allocator_groups_layer_topk-0.05-aware"
    )
    with pytest.raises(
        ValueError, match="preset must be left out or 'tuned' where policy is 'snapkv'; got 'tuned-hits'"
    ):
        UncompConfig(policy="snapkv", preset="tuned-hits")
    with pytest.raises(ValueError, match="preset must be one of None, 'tuned', 'tuned-hits'; got 'best'"):
        UncompConfig(preset="best")
    wrong = UncompConfig(policy_options={"allocator": "hits"})
    with pytest.raises(
        ValueError, match=r"allocator of uncomp must be one of 'groups', 'groups\*layer_topk'; got 'hits'"
    ):
        make_policy(wrong, shape_of(wrong))
    deleted = UncompConfig(delete_heads=1, policy_options=OPTION)
    with pytest.raises(ValueError, match="allocator must be 'groups' where delete_heads is given"):
        make_policy(deleted, shape_of(deleted))
