# SPDX-License-Identifier: Apache-2.0
"""What a profile of a tiny model does to its cache: the order of the rows, whole models, models of which it is not."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import uncomp
from hf.test_calibrate import drawn, run
from uncomp import UncompConfig
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf


def test_a_profile_serves_its_model(tmp_path, recwarn):
    """The order of a compressed cache is the profile's; of another config with the same sizes it warns."""
    model, out = tiny_model("llama"), tmp_path / "p.json"
    profile = run(model, out=out)
    ids = drawn(1, 200)[0][None]
    config = UncompConfig(budget=40, profile=str(out), groups=4)
    with uncomp.patch(model, config) as handle:
        cache = model(ids, use_cache=True).past_key_values
        limits = [layer.ragged.limit[0].tolist() for layer in cache.uncomp.layers]
        del handle
    for layer, found in enumerate(limits):
        order = [found[row] for row in sorted(range(4), key=profile.groups(layer, 4).__getitem__)]
        assert order == sorted(found)
    assert not [w for w in recwarn if "another config" in str(w.message)]
    with pytest.warns(UserWarning, match="made with another config of llama"):
        uncomp.patch(tiny_model("llama", rms_norm_eps=1e-3), config).remove()
    with pytest.raises(ValueError, match=r"type of the model must be llama, .*config.*; got qwen2 \(qwen2, 4 layers"):
        uncomp.patch(tiny_model("qwen2"), config)


def test_a_profile_of_variances_orders_by_them(tmp_path):
    model, out = tiny_model("llama"), tmp_path / "p.json"
    profile = run(model, kind="variance", out=out)
    options = {"budget": 40, "profile": str(out), "groups": 4}
    with uncomp.patch(model, UncompConfig(**options, entropy_kind="variance")):
        cache = model(drawn(1, 200)[0][None], use_cache=True).past_key_values
        found = [layer.ragged.limit[0].tolist() for layer in cache.uncomp.layers]
    for layer, limits in enumerate(found):
        order = [limits[row] for row in sorted(range(4), key=profile.groups(layer, 4).__getitem__)]
        assert order == sorted(limits)
    with pytest.raises(ValueError, match="kind must be 'variance', as the profile was made with; got 'truncated'"):
        uncomp.patch(model, UncompConfig(**options))


def test_a_profile_serves_a_model_with_sliding_layers(tmp_path):
    """It covers all four layers; the two that are compressed take theirs."""
    model, out = tiny_model("gemma3_text"), tmp_path / "p.json"
    profile = run(model, out=out)
    config = UncompConfig(budget=40, profile=str(out), groups=4, skip_sliding=True)
    with uncomp.patch(model, config) as handle:
        managed = handle.facts.managed
        cache = model(drawn(1, 200)[0][None], use_cache=True).past_key_values
        limits = [layer.ragged.limit[0].tolist() for layer in cache.uncomp.layers]
    assert managed == [1, 3]
    for layer, found in zip(managed, limits, strict=True):
        order = [found[row] for row in sorted(range(4), key=profile.groups(layer, 4).__getitem__)]
        assert order == sorted(found) and len(set(found)) == 4
    with pytest.raises(ValueError, match="order no heads"):
        run(model, tensor="hidden", out=out)
        uncomp.patch(model, config)
