# SPDX-License-Identifier: Apache-2.0
"""A policy of a few lines that the package has never heard of fills the cache."""

from __future__ import annotations

import pytest
from policy_support import Run, chosen, shape_of

from uncomp import Policy, UncompConfig, config, policies, register_policy


@pytest.fixture
def key_norm():
    @register_policy
    class KeyNorm(Policy):
        """Keeps the tokens with the shortest keys."""

        name = "test_key_norm"
        defaults = {"pool_width": 1}  # noqa: RUF012

        def score(self, view):
            return -view.keys.float().norm(dim=-1)

    yield KeyNorm
    del policies.base._policies["test_key_norm"], config._policy_defaults["test_key_norm"]


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
def test_key_norms_fill_the_cache(key_norm, rows):
    made = UncompConfig(policy="test_key_norm", budget=30, rows=rows)
    shape = shape_of(made)
    run = Run(made, shape, [120, 50])
    for layer in range(3):
        norms = -run.stories[0].key[layer, :, :120].double().norm(dim=-1).repeat_interleave(shape.rows // 3, 0)
        assert run.kept(layer)[: shape.rows] == [chosen(s, 120, 30, 8) for s in norms]
    run.step()
    run.turn([20, 30])
    assert {len(kept) for kept in run.kept(0)} == {30}


def test_names_are_guarded(key_norm):
    with pytest.raises(ValueError, match="must have a name"):
        register_policy(type("Nameless", (Policy,), {"name": ""}))
    with pytest.raises(ValueError, match="'snapkv' is taken by SnapKV"):
        register_policy(type("Other", (Policy,), {"name": "snapkv"}))
    with pytest.raises(ValueError, match="defaults may set"):
        register_policy(type("Odd", (Policy,), {"name": "odd", "defaults": {"budget": 3}}))
