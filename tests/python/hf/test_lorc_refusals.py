# SPDX-License-Identifier: Apache-2.0
"""What compress refuses: in one line that names the layer and the projection, and the model is as it was."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from uncomp import lorc
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("fields", [{"schedule": "uniform"}, {"rank_k": 32, "rank_v": 32, "svd": "randomised"}, {}])
def test_weights_that_are_not_finite_are_refused(fields):
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^uncomp\.lorc: v_proj of layer 1 must be finite; got NaN or infinity"):
        lorc.compress(model, lorc.LorcConfig(**fields))
    assert type(model.model.layers[0].self_attn.k_proj) is torch.nn.Linear and not hasattr(model.model, "_uncomp_lorc")


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_what_is_folded_must_be_finite(name, kind):
    model = tiny_model("llama", num_hidden_layers=2, attention_bias=True)
    with torch.no_grad():
        getattr(getattr(model.model.layers[1].self_attn, name), kind).view(-1)[3] = torch.inf
    what = name if kind == "weight" else f"bias of {name}"
    with pytest.raises(ValueError, match=rf"^uncomp\.lorc: {what} of layer 1 must be finite; got NaN or infinity"):
        lorc.compress(model, lorc.LorcConfig(rho=0.5))
    assert not hasattr(model.model, "_uncomp_lorc")


@pytest.mark.parametrize(("kappa", "part"), [("layer", ""), ("per_head_mean", "a head of ")])
def test_weights_of_zeros_are_named(kappa, part):
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    with pytest.raises(ValueError, match=rf"^uncomp\.lorc: weights of {part}v_proj of layer 1 must not all be zero"):
        lorc.compress(model, lorc.LorcConfig(kappa=kappa))


def test_a_second_compression_is_refused_and_weights_that_went_cannot_come_back():
    model = tiny_model("llama", num_hidden_layers=1)
    handle = lorc.compress(model, keep_weights=False)
    with pytest.raises(ValueError, match=r"^uncomp\.lorc\.compress: the model is compressed already"):
        lorc.compress(model)
    with pytest.raises(RuntimeError, match=r"^uncomp\.lorc: the original weights were not kept"):
        handle.remove()


def _quantised(model):
    attention = model.model.layers[1].self_attn
    attention.v_proj = type("Linear4bit", (torch.nn.Linear,), {})(64, 256)


def _tied(model):
    layers = model.model.layers
    layers[1].self_attn.k_proj.weight = layers[0].self_attn.k_proj.weight


def _wide(model):
    model.model.layers[1].self_attn.o_proj.double()


def _hooked(model):
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, args, out: 2 * out)


def _hooked_before(model):
    model.model.layers[1].self_attn.k_proj.register_forward_pre_hook(lambda module, args: None)


def _offloaded(model):
    model.model.layers[1].self_attn.k_proj.to("meta")


def _headless(model):
    del model.model.layers[1].self_attn.k_proj


def _dynamic(model):
    model.config.rope_parameters["rope_type"] = "dynamic"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_quantised, "v_proj of layer 1 of LlamaAttention is a Linear4bit"),
        (_tied, "k_proj of layer 0 of LlamaAttention shares its weight"),
        (_wide, "o_proj of layer 1 of LlamaAttention must be float32, float16 or bfloat16"),
        (_hooked, "o_proj of layer 1 of LlamaAttention has forward hooks"),
        (_hooked_before, "k_proj of layer 1 of LlamaAttention has forward hooks"),
        (_offloaded, "k_proj of layer 1 of LlamaAttention is not in memory"),
        (_headless, "k_proj of layer 1 of LlamaAttention is missing; the attention must have q_proj"),
        (_dynamic, "rotary embeddings of type dynamic change with the length"),
    ],
)
def test_projections_that_cannot_be_split_are_refused(change, text):
    model = tiny_model("llama", num_hidden_layers=2)
    change(model)
    before = {name: id(m) for name, m in model.named_modules()}
    with pytest.raises(NotImplementedError, match=rf"^uncomp\.lorc: {text}"):
        lorc.compress(model)
    assert {name: id(m) for name, m in model.named_modules()} == before
    assert not hasattr(model.model, "_uncomp_lorc")


@pytest.mark.parametrize(
    ("family", "fields", "kind", "text"),
    [
        ("llama", {"key_mode": "absorb"}, NotImplementedError, "layer 0 has rotary positions"),
        ("llama", {"rank_k": 80}, ValueError, "rank_k must be at most the head dim 64; got 80"),
        ("llama", {"whiten": "calib"}, ValueError, "calibration must be given exactly with"),
    ],
)
def test_what_does_not_fit_is_refused(family, fields, kind, text):
    model = tiny_model(family, num_hidden_layers=1)
    with pytest.raises(kind, match=rf"^uncomp\..*{text}"):
        lorc.compress(model, lorc.LorcConfig(**fields))
    assert not hasattr(model.model, "_uncomp_lorc")


def test_normalised_keys_are_not_absorbed():
    model = tiny_model("qwen3", num_hidden_layers=1)
    model.model.rotary_emb.inv_freq.zero_()
    with pytest.raises(NotImplementedError, match="layer 0 normalises its keys"):
        lorc.compress(model, lorc.LorcConfig(key_mode="absorb"))


@pytest.mark.parametrize(
    "tokens", [[[1, 2]], torch.ones(3), torch.ones(2, 2), torch.full((1, 3), 199), torch.full((1, 3), -1)], ids=str
)
def test_bad_calibration_is_refused(tokens):
    model = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"^uncomp\.lorc\.compress: calibration must be"):
        lorc.compress(model, lorc.LorcConfig(whiten="calib"), calibration=tokens)
    assert not model.model.layers[0].self_attn.k_proj._forward_hooks


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match=r"^uncomp\.lorc: model must be a model of transformers; got Linear"):
        lorc.compress(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^uncomp\.lorc\.compress: config must be a LorcConfig; got dict"):
        lorc.compress(tiny_model("llama", num_hidden_layers=1), {})
