# SPDX-License-Identifier: Apache-2.0
"""uncomp: groups and limits of docs/method.md through the whole compressor, profiles, presets, refusals."""

from __future__ import annotations

import math
import re

import pytest
import torch
from policy_support import Run, by_row, chosen, pooled, shape_of, weights

from uncomp import UncompConfig
from uncomp.calibration.profile import CalibrationRun, HeadProfile, ModelFacts
from uncomp.policies import make_policy
from uncomp.types import CacheShape, PlanRequest


def limits_of(statistic, n, *, layers=1, layer=0, **fields):
    """Limits of one sequence by the policy itself, for given entropies of the rows that are planned together."""
    config = UncompConfig(**fields)
    whole = config.group_scope == "model"
    rows = len(statistic) // (layers if whole else 1)
    policy = make_policy(config, CacheShape(layers, rows, rows, 16, rows))
    planned = range(layers) if whole else [layer]
    total = sum(policy.totals(i, [n])[0] for i in planned)
    request = PlanRequest(list(planned), [n], [total], torch.tensor([statistic]), [], [], torch.device("cpu"))
    limits = policy.limits(request)[0].tolist()
    assert sum(limits) == total
    return limits


ASCENDING = [0.1 * i for i in range(1, 9)]


# ---- limits of docs/method.md
@pytest.mark.parametrize(
    "groups, budget, n, want",
    [
        (2, 384, 4096, [256] * 4 + [512] * 4),
        (2, 384, 500, [268] * 4 + [500] * 4),
        (2, 384, 300, [300] * 4 + [468] * 4),
        (2, 384, 200, [256] * 4 + [512] * 4),
        (8, 384, 4096, [128, 201, 274, 347, 421, 494, 567, 640]),
        (8, 384, 600, [130, 204, 279, 353, 428, 502, 576, 600]),
        (8, 384, 400, [272] + [400] * 7),
        (8, 384, 300, [300, 300, 300, 306, 370, 434, 499, 563]),
        (4, 384, 4096, [128, 128, 299, 299, 469, 469, 640, 640]),
        (2, 64, 4096, [43] * 4 + [85] * 4),
        (8, 64, 4096, [21, 34, 46, 58, 70, 82, 94, 107]),
        (8, 16, 4096, [8, 9, 11, 14, 17, 20, 23, 26]),
        (8, 10, 4096, [8, 8, 8, 8, 10, 11, 13, 14]),
    ],
)
def test_known_limits(groups, budget, n, want):
    assert limits_of(ASCENDING, n, groups=groups, budget=budget) == want
    shuffled = [3, 0, 7, 5, 1, 6, 2, 4]
    assert limits_of([ASCENDING[i] for i in shuffled], n, groups=groups, budget=budget)[1] == want[0]
    if n == 4096:
        assert limits_of(ASCENDING[::-1], n, groups=groups, budget=budget, order="reverse")[0] == want[0]


def test_three_rows_and_two_groups():
    assert limits_of([0.1, 0.2, 0.3], 4096, budget=100) == [60, 120, 120]


def test_nan_ranks_highest():
    assert limits_of([math.nan, 0.9, 0.1, 0.2], 4096, budget=60) == [80, 80, 40, 40]


def test_named_and_explicit_shapes():
    assert limits_of(ASCENDING, 4096, shape="g8") == [20, 128, 256, 384, 384, 512, 640, 748]
    assert limits_of(ASCENDING, 4096, shape="g8", budget=192)[-1] == 374
    assert limits_of(ASCENDING[:2], 4096, shape=(100, 300)) == [100, 300]
    assert limits_of(ASCENDING[:2], 4096, shape=(100, 300), budget=100) == [50, 150]
    assert limits_of(ASCENDING, 4096, shape="linear(640, 74, 8)") == [122, 196, 270, 344, 418, 492, 566, 640]
    assert limits_of(ASCENDING[:4], 4096, groups=4, spread="1/2", budget=90) == [45, 75, 105, 135]
    for layer, want in ((0, [128, 640]), (1, [384, 384]), (2, [384, 384]), (3, [128, 640])):
        assert limits_of([0.1, 0.2], 4096, layers=4, layer=layer, shape="g32-mixed") == want
    rising = [i / 100 for i in range(32)]
    assert limits_of(rising, 3000, shape="g32-stream") == [20] * 31 + [3000]
    assert limits_of(rising, 4096, shape="g32") == list(range(144, 641, 16))


def test_extreme():
    assert limits_of(ASCENDING, 4096, budget=64, extreme=12) == [12] * 4 + [116] * 4
    assert limits_of(ASCENDING[:3], 4096, budget=64, extreme=12) == [12, 90, 90]
    assert limits_of(ASCENDING, 1000, budget=0.1, extreme=12) == [12] * 4 + [188] * 4


def test_budgets_by_the_entropy_of_each_row():
    entropy = [0.4, 0.1, 0.3, 0.2]
    assert limits_of(entropy, 4096, shape="entropy", budget=100) == [160, 40, 120, 80]
    assert limits_of(entropy, 4096, shape="entropy", budget=100, order="reverse") == [40, 160, 80, 120]
    dealt = limits_of(entropy, 4096, shape="entropy", budget=100, order="random", seed=3)
    assert sorted(dealt) == [40, 80, 120, 160]
    assert limits_of([0.5, 0.3, 0.4], 4096, shape="entropy", spread=0.5, budget=100) == [150, 50, 100]
    assert limits_of([0.2, 0.2, 0.2], 4096, shape="entropy", spread=0.5, budget=100) == [100, 100, 100]
    assert limits_of([math.nan, 0.4, 0.2, math.nan], 4096, shape="entropy", budget=70) == [80, 80, 40, 80]
    assert limits_of([0.0, 0.0], 4096, shape="entropy", budget=70) == [70, 70]
    assert limits_of([0.9, 0.0001], 4096, shape="entropy", budget=70) == [132, 8]  # the floor
    assert limits_of([0.9, 0.3], 100, shape="entropy", budget=70) == [100, 40]  # no more than the prompt has
    assert limits_of([0.9, 0.3], 50, shape="entropy", budget=70) == [90, 50]  # at least the whole prompt
    assert limits_of([0.7], 4096, shape="entropy", budget=70) == [70]
    both = limits_of([0.4, 0.1, 0.3, 0.2], 4096, layers=2, shape="entropy", group_scope="model", budget=100)
    assert both == [160, 40, 120, 80]


def test_groups_over_the_whole_model():
    entropy = [0.5, 0.1, 0.9, 0.2, 0.8, 0.3]  # 3 layers of 2 rows
    assert limits_of(entropy, 4096, layers=3, group_scope="model", budget=90) == [120, 60, 120, 60, 120, 60]
    two = limits_of(entropy, 4096, layers=3, group_scope="model", shape=(60, 121))
    assert two == [121, 60, 121, 60, 121, 60]


def test_a_pyramid_over_layers():
    config = UncompConfig(budget=60, layer_shape="pyramid")
    run = Run(config, shape_of(config), [200])
    sums = [int(layer.limit.sum()) for layer in run.layers]
    assert sum(sums) == 3 * 3 * 60 and sums == sorted(sums, reverse=True) and sums[0] > sums[2]


# ---- through the compressor
def reference_entropy(states, top):
    centred = states.double() - states.double().mean(0)
    unit = centred / centred.norm(dim=1, keepdim=True)
    spectrum = torch.linalg.eigvalsh(unit.T @ unit / unit.norm() ** 2).flip(0)[:top].clamp(min=1e-30)
    return float(-(spectrum * spectrum.log()).sum() / math.log(states.shape[1]))


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_order_and_tokens(rows, reduce):
    config = UncompConfig(budget=60, rows=rows, groups=3, reduce_entropy=reduce)
    shape, n = shape_of(config), 160
    run = Run(config, shape, [n])
    step = {"kv_head": [20, 60, 100], "query_head": [20, 20, 60, 60, 100, 100]}[rows]
    for layer in range(shape.num_layers):
        heads = torch.tensor([reference_entropy(q[:n], 4) for q in run.stories[0].query[layer]]).view(shape.rows, -1)
        entropy = heads.mean(1) if reduce == "mean" else heads.amax(1)
        torch.testing.assert_close(run.layers[layer].statistic[0], entropy.float(), rtol=0, atol=1e-4)
        want = [0] * shape.rows
        for rank, row in enumerate(sorted(range(shape.rows), key=lambda r: float(entropy[r]))):
            want[row] = step[rank]
        assert run.layers[layer].limit.tolist() == [want]
        scores = by_row(weights(run.stories[0], layer, n)[:, -8:].sum(1), shape.rows)
        assert run.kept(layer) == [chosen(pooled(s[: n - 8], 7), n, b, 8) for s, b in zip(scores, want, strict=True)]


def test_the_order_of_a_prompt_stays_in_later_turns():
    config = UncompConfig(budget=40, groups=3)
    run = Run(config, shape_of(config), [120])
    before = [layer.limit.clone() for layer in run.layers], [layer.statistic.clone() for layer in run.layers]
    run.turn([90])
    assert all(torch.equal(a, layer.limit) for a, layer in zip(before[0], run.layers, strict=True))
    assert all(torch.equal(a, layer.statistic) for a, layer in zip(before[1], run.layers, strict=True))


def test_orders_move_budgets_to_other_rows():
    plain, back = (
        Run(c, shape_of(c), [150])
        for c in (UncompConfig(budget=40, groups=3, order=o) for o in ("ascending", "reverse"))
    )
    for one, other in zip(plain.layers, back.layers, strict=True):
        assert torch.equal(one.limit + other.limit, torch.full((1, 3), 80, dtype=torch.int32))
    lot = UncompConfig(budget=40, groups=3, order="random", seed=5)
    first, second = Run(lot, shape_of(lot), [150]), Run(lot, shape_of(lot), [90])
    assert all(torch.equal(a.limit, b.limit) for a, b in zip(first.layers, second.layers, strict=True))
    assert first.layers[0].statistic is None


def test_nan_in_a_prompt_starves_no_row():
    config = UncompConfig(budget=40, groups=3)
    shape = shape_of(config)
    run = Run(config, shape, [100])
    run.stories[0].query[1, 2, 5] = float("nan")  # row 1 of layer 1
    again = Run(config, shape, [100], run.stories)
    assert int(again.layers[1].limit[0].argmax()) == 1 and again.layers[1].statistic.isnan().tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
def test_the_tuned_preset(rows):
    config = UncompConfig(preset="tuned", budget=48, rows=rows)
    assert (config.groups, config.group_scope, config.reduce_scores, config.value_norm) == (8, "model", "max", True)
    shape = shape_of(config)
    run = Run(config, shape, [150, 60])
    limits = torch.cat([layer.limit for layer in run.layers], 1)
    assert limits.sum(1).tolist() == [48 * shape.rows * 3] * 2
    assert len(set(limits[0].tolist())) >= 8
    scores = weights(run.stories[0], 2, 150)[:, -8:].sum(1).view(shape.rows, -1, 150).amax(1)
    value = run.stories[0].value[2, :, :150].double().norm(dim=-1).repeat_interleave(shape.rows // 3, 0)
    want = [
        chosen(pooled(s[:142], 7), 150, b, 8)
        for s, b in zip(scores * value, limits[0, 2 * shape.rows :].tolist(), strict=True)
    ]
    assert run.kept(2)[: shape.rows] == want


# ---- profiles
@pytest.fixture
def profile(tmp_path):
    """3 layers, 6 query heads on 3 KV heads: in layer l the row l stands highest, the others in order."""

    def votes(rows):
        ranks = [[[0] * rows for _ in range(rows)] for _ in range(3)]
        for layer in range(3):
            for rank, row in enumerate([r for r in range(rows) if r != layer] + [layer]):
                ranks[layer][row][rank] = 10
        return ranks

    entropy = [
        [0.5 + 0.01 * layer + (0.3 if head // 2 == layer else 0.001 * head) for head in range(6)] for layer in range(3)
    ]
    made = HeadProfile(
        ModelFacts("tiny", 3, 6, 3, 16, "0" * 64),
        CalibrationRun(10, 64, 42, 4, "truncated", {"entropy": "mean"}, "0" * 64),
        entropy, entropy, [1 / 16] * 16, [1.0] * 3,
        {"kv_head": votes(3), "query_head": votes(6)},
    )  # fmt: skip
    made.save(tmp_path / "profile.json")
    return str(tmp_path / "profile.json")


def test_groups_of_a_profile(profile):
    config = UncompConfig(budget=40, profile=profile, groups=3)
    run = Run(config, shape_of(config), [150])
    assert [layer.limit[0].tolist() for layer in run.layers] == [[67, 13, 40], [13, 67, 40], [13, 40, 67]]
    assert run.layers[0].statistic is None
    back = UncompConfig(budget=40, profile=profile, groups=3, order="reverse")
    assert Run(back, shape_of(back), [150]).layers[0].limit[0].tolist() == [13, 67, 40]
    heads = UncompConfig(budget=40, profile=profile, groups=6, rows="query_head")
    limits = Run(heads, shape_of(heads), [150]).layers[1].limit[0].tolist()
    assert limits.index(max(limits)) == 1 and sum(limits) == 240


def test_model_groups_of_a_profile(profile):
    config = UncompConfig(budget=40, profile=profile, groups=3, group_scope="model")
    run = Run(config, shape_of(config), [150])
    assert [layer.limit[0].argmax().item() for layer in run.layers] == [0, 1, 2]
    assert sum(int(layer.limit.sum()) for layer in run.layers) == 9 * 40


def test_budgets_by_the_entropies_of_a_profile(profile):
    config = UncompConfig(budget=40, profile=profile, shape="entropy")
    run = Run(config, shape_of(config), [150, 90])
    for layer, held in enumerate(run.layers):
        assert held.limit[0].tolist() == held.limit[1].tolist() and held.limit.sum(1).tolist() == [120, 120]
        assert int(held.limit[0].argmax()) == layer
    whole = UncompConfig(budget=40, profile=profile, shape="entropy", group_scope="model")
    assert sum(int(layer.limit[0].sum()) for layer in Run(whole, shape_of(whole), [150]).layers) == 9 * 40


def test_the_elbow_of_a_profile(profile):
    config = UncompConfig(profile=profile, entropy_top="elbow")
    with pytest.raises(ValueError, match="k must be 4, as the profile was made with; got 'elbow' = 16"):
        make_policy(config, shape_of(config))
    with pytest.raises(ValueError, match="profile must be a file where entropy_top is \"elbow\"; got 'online'"):
        UncompConfig(entropy_top="elbow")


def test_an_order_by_variance():
    config = UncompConfig(budget=40, groups=3, entropy_kind="variance")
    shape = shape_of(config)
    run = Run(config, shape, [150, 60])  # padding holds NaN
    for layer, held in enumerate(run.layers):
        for b, n in enumerate([150, 60]):
            heads = run.stories[b].query[layer, :, :n].double().var(1, correction=0).mean(1)
            want = heads.view(3, 2).mean(1).float()
            torch.testing.assert_close(held.statistic[b], want, rtol=1e-5, atol=0)
            assert held.limit[b].argsort().tolist() == want.argsort().tolist()


def test_a_foreign_profile_is_refused(profile):
    config = UncompConfig(profile=profile)
    with pytest.raises(ValueError, match="L of the model must be 3"):
        make_policy(config, shape_of(config, layers=4))
    with pytest.raises(ValueError, match="kind must be 'truncated'"):
        make_policy(UncompConfig(profile=profile, entropy_kind="renyi2"), shape_of(config))
    with pytest.raises(ValueError, match="k must be 4"):
        make_policy(UncompConfig(profile=profile, entropy_top=5), shape_of(config))
    with pytest.raises(FileNotFoundError):
        make_policy(UncompConfig(profile="/nowhere.json"), shape_of(config))


# ---- refusals, at construction
@pytest.mark.parametrize(
    "fields, text",
    [
        ({"groups": 4}, "groups must lie in [1, 3], the rows of a layer; got 4"),
        ({"groups": 10, "group_scope": "model"}, "groups must lie in [1, 9], the rows of the model; got 10"),
        ({"shape": "g8"}, "groups must lie in [1, 3], the rows of a layer; got 8"),
        ({"shape": "g7"}, "shape must be one of"),
        ({"shape": (100, 0)}, "shape must hold positive integers"),
        ({"shape": "g2", "groups": 3}, "groups must be 2, as shape g2 has; got 3"),
        ({"shape": "g32-mixed", "group_scope": "model"}, 'differs by layer and needs group_scope="layer"'),
        ({"shape": "g2", "layer_shape": "pyramid"}, "layer_shape='pyramid' of a named shape needs a budget"),
        ({"shape": (3, 5)}, "must hold rows * (window + sinks) = 24 tokens; got 13"),
        ({"extreme": 12, "shape": "g2"}, "leave shape at 'linear'"),
        ({"extreme": 12, "groups": 3}, "groups must be 2 where extreme is given; got 3"),
        ({"extreme": 4}, "extreme must lie between window + sinks = 8"),
        ({"extreme": 500}, "extreme must lie between window + sinks = 8 and the mean of 384"),
        ({"shape": "entropy", "groups": 2}, 'groups must be left out where shape is "entropy"; got 2'),
        ({"shape": "entropy", "extreme": 12}, "leave shape at 'linear'"),
        ({"shape": "entropy", "spread": 1.0}, "spread must lie in [0, 1)"),
        ({"spread": "wide"}, "spread must be a number in [0, 1)"),
        ({"spread": 1.0}, "spread must lie in [0, 1)"),
    ],
)
def test_what_does_not_fit_is_refused(fields, text):
    config = UncompConfig(**fields)
    with pytest.raises(ValueError, match=re.escape(text)):
        make_policy(config, shape_of(config))
