# SPDX-License-Identifier: Apache-2.0
"""merge_retrieval_layer: which weights it mixes, that it gives them back to the bit, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from uncomp import merge_retrieval_layer
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf


@pytest.fixture
def model():
    return tiny_model("llama", num_hidden_layers=4)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


CURVE = [5.0, 4.0, 6.0, 9.0]  # layer 2 rises most of the inner ones


@pytest.mark.parametrize("write", ["both", "last", "retrieval"])
def test_which_weights_are_mixed(model, write):
    before = weights(model)
    with merge_retrieval_layer(model, CURVE, alpha=0.25, write=write) as handle:
        assert handle.layer == 2
        for name, now in weights(model).items():
            want = before[name]
            for mine, other, place in ((".2.", ".3.", "retrieval"), (".3.", ".2.", "last")):
                if mine in name and write in ("both", place):
                    want = 0.75 * before[name] + 0.25 * before[name.replace(mine, other)]
            torch.testing.assert_close(now, want, rtol=1e-6, atol=1e-7)
    handle.remove()
    assert all(torch.equal(now, before[name]) for name, now in weights(model).items())


def test_half_precision_is_mixed_in_float32(model):
    model = model.bfloat16()
    before = weights(model)
    handle = merge_retrieval_layer(model, CURVE)
    name = "model.layers.2.mlp.up_proj.weight"
    want = (before[name].float() + before[name.replace(".2.", ".3.")].float()) / 2
    assert torch.equal(weights(model)[name], want.bfloat16())
    handle.remove()
    assert all(torch.equal(now, before[name]) for name, now in weights(model).items())


@pytest.mark.parametrize(
    ("curve", "options", "text"),
    [
        (CURVE, {"alpha": 1.5}, r"alpha must be a number in \[0, 1\]; got 1.5"),
        (CURVE, {"alpha": math.nan}, "alpha must be a number"),
        (CURVE, {"write": "none"}, "write must be one of both, last, retrieval; got 'none'"),
        (CURVE[:3], {}, "profile must have 4 layers, as the model; got 3"),
        ([1.0, 2.0, math.nan, 3.0], {}, "curve must hold finite numbers"),
    ],
)
def test_what_is_refused(model, curve, options, text):
    before = weights(model)
    with pytest.raises(ValueError, match=f"^uncomp.*{text}"):
        merge_retrieval_layer(model, curve, **options)
    assert all(torch.equal(now, before[name]) for name, now in weights(model).items())
