# SPDX-License-Identifier: Apache-2.0
"""calibration.summary: numbers worked by hand, and a plan that is what the policy gives."""

import dataclasses
import json

import pytest
import torch
from profile_support import made_profile

import uncomp
from uncomp.calibration.summary import certainty, head_plan, likeness, rank_correlation, summary
from uncomp.policies.uncomp import UNComp
from uncomp.types import CacheShape, PlanRequest


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == 1
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(0.866025, abs=1e-6)  # ranks .5 .5 2
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    with pytest.raises(ValueError, match="must have one length, not 0; got 2, 3"):
        rank_correlation([1, 2], [1, 2, 3])


def test_certainty_by_hand():
    """Row 0 fell into the lower half in 4 of 5 texts in one layer, in 3 of 5 in the other."""
    profile = made_profile(2, 2, 2)
    votes = (((4, 1), (1, 4)), ((2, 3), (3, 2)))
    profile = dataclasses.replace(profile, rank_votes={"kv_head": votes, "query_head": votes})
    assert certainty(profile, 2) == pytest.approx((0.8 + 0.6) / 2)
    assert certainty(profile, 1) == 1


@pytest.mark.parametrize(
    ("groups", "rows", "scope"),
    [(2, "kv_head", "layer"), (4, "query_head", "layer"), (8, "kv_head", "model"), (5, "query_head", "model")],
)
def test_the_plan_is_that_of_the_policy(tmp_path, groups, rows, scope):
    profile = made_profile(4, 8, 4)
    profile.save(tmp_path / "p.json")
    plan = head_plan(profile, groups, rows=rows, scope=scope, budget=100)
    config = uncomp.UncompConfig(
        budget=100, groups=groups, rows=rows, group_scope=scope, profile=str(tmp_path / "p.json"), entropy_top=16
    )
    count = 4 if rows == "kv_head" else 8
    policy = UNComp(config, CacheShape(4, 8, 4, 64, count))
    limits = []
    for layers in [[layer] for layer in range(4)] if scope == "layer" else [list(range(4))]:
        total = sum(policy.totals(layer, [4000])[0] for layer in layers)
        limits += policy.limits(PlanRequest(layers, [4000], [total], None, [], [], torch.device("cpu")))[0].tolist()
    assert [limit for layer in plan.limits for limit in layer] == limits
    assert sum(limits) == 4 * count * 100


def test_defaults_and_presets():
    few, many = made_profile(6, 9, 3), made_profile(6, 32, 32)
    assert (head_plan(few).num_groups, head_plan(few).scope) == (8, "model")
    assert (head_plan(many).num_groups, head_plan(many).scope) == (8, "layer")
    assert head_plan(made_profile(2, 2, 1)).num_groups == 2
    assert head_plan(few, 3).scope == "layer"
    assert head_plan(many, shape="g5").tokens() == [(256, 256), (320, 320), (384, 384), (448, 448), (512, 512)]
    assert [len(set(ids)) for ids in head_plan(made_profile(8, 4, 4), shape="g32-mixed").groups] == [2, 2] + [1] * 4 + [
        2,
        2,
    ]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_groups": 19}, r"groups must lie in \[1, 18\], the rows of a model; got 19"),
        ({"num_groups": 4, "scope": "layer"}, r"groups must lie in \[1, 3\], the rows of a layer; got 4"),
        ({"num_groups": 3, "shape": "g2"}, "groups must be 2, as shape g2 has; got 3"),
        ({"rows": "head"}, "rows must be kv_head or query_head; got 'head'"),
        ({"scope": "all"}, "scope must be one of layer, model; got 'all'"),
        ({"budget": 7}, "budget must be at least window . sinks = 8"),
    ],
)
def test_plans_that_are_refused(options, text):
    with pytest.raises(ValueError, match=rf"^uncomp.*{text}"):
        head_plan(made_profile(6, 9, 3), **options)


def test_likeness():
    """A profile is like itself; more noise, less alike; heads of 4 and of 2 are compared as 2."""
    one = made_profile(6, 8, 4)
    same = likeness(one, one)
    assert (same.layer_mean, same.model, same.curve) == (1, 1, 1) and same.layers == [1] * 6
    near, far = (likeness(one, made_profile(6, 8, 4, noise=n, seed=1)).model for n in (0.01, 0.3))
    assert 1 > near > far
    halves = made_profile(6, 4, 4)
    halves = dataclasses.replace(halves, entropy=[[(h[i] + h[i + 1]) / 2 for i in (0, 2, 4, 6)] for h in one.entropy])
    assert likeness(one, halves).model == pytest.approx(1)
    keys = dataclasses.replace(
        one,
        run=dataclasses.replace(one.run, tensor="key"),
        entropy=[[v for i in (0, 2, 4, 6) for v in 2 * [(h[i] + h[i + 1]) / 2]] for h in one.entropy],
    )
    assert likeness(one, keys).layers == [1] * 6
    for other in (made_profile(5, 8, 4), made_profile(6, 3, 3)):
        with pytest.raises(
            ValueError, match=r"^uncomp.calibration: profiles to compare must be of one model; got llama"
        ):
            likeness(one, other)


def test_summary_is_plain_json():
    profile = made_profile(6, 9, 3)
    found = summary(profile, head_plan(profile))
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["model", "run", "entropy", "elbow", "curve", "certainty", "groups"]
    assert list(found["certainty"]) == ["2"] and 0 < found["certainty"]["2"] <= 1
    means = [sum(heads) / 9 for heads in profile.entropy]
    assert means[found["entropy"]["lowest_layer"]] == min(means)
    assert found["groups"]["tokens"][0][0] < found["groups"]["tokens"][-1][1]
