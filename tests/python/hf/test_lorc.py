# SPDX-License-Identifier: Apache-2.0
"""compress and its handle: what a model computes with factors, what it refuses, and that removal is exact."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from lorc_support import compressed_and_dense, prompt, with_biases

import uncomp
from uncomp import lorc, transforms
from uncomp.testing import tiny_model
from uncomp.transforms.lorc import apply, factors

pytestmark = pytest.mark.hf
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "gemma3_text"]


@torch.no_grad()
def logits(model, columns: int = 40):
    ids, mask = prompt(columns=columns)
    return model(ids, attention_mask=mask).logits[mask.bool()]


def footprint(model):
    """Modules by name and identity, parameters by name, identity and bits, and marks."""
    parameters = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    return {name: id(m) for name, m in model.named_modules()}, parameters, sorted(vars(model.model))


def same(one, other) -> bool:
    bits = all(i == j and torch.equal(a, b) for (i, a), (j, b) in zip(one[1].values(), other[1].values(), strict=True))
    return one[0] == other[0] and list(one[1]) == list(other[1]) and bits and one[2] == other[2]


# ---- what is computed
@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_the_original_logits_and_removal_the_very_same_weights(family):
    model = with_biases(tiny_model(family, num_hidden_layers=2, **_layer_types(family)))
    before, want = footprint(model), logits(model)
    with lorc.compress(model, lorc.LorcConfig(rho=1.0)) as handle:
        assert handle.stats()["kept_share"] == 1.0
        got = logits(model)
        assert (got - want).abs().max() < 2e-5 * want.abs().max()
    handle.remove()
    assert same(footprint(model), before)
    assert torch.equal(logits(model), want)


def _layer_types(family: str) -> dict:
    return {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3_text" else {}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3"])
def test_factors_compute_what_full_width_projections_of_their_product_do(family):
    model, _, dense = compressed_and_dense(family, lorc.LorcConfig(rho=(0.5, 0.75), svd="randomised"))
    want = logits(dense)
    assert (logits(model) - want).abs().max() < 3e-5 * want.abs().max()


def test_keys_without_positions_are_absorbed_exactly():
    """Absorbed, rebuilt and dense keys of one rank are the same; a bias of the keys drops out of the softmax."""
    made = []
    for mode in ("absorb", "rebuild"):
        model = tiny_model("llama", num_hidden_layers=2, attention_bias=True)
        model.model.rotary_emb.inv_freq.zero_()
        lorc.compress(with_biases(model), lorc.LorcConfig(rho=0.5, key_mode=mode))
        made.append(logits(model))
    assert (made[0] - made[1]).norm() <= 1e-6 * made[1].norm()


def test_a_fused_projection_is_split_and_comes_back():
    """The queries' part keeps its bits, and no part holds on to the fused weight."""
    model = tiny_model("phi3", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    fused, want = attention.qkv_proj, attention.qkv_proj.weight.detach().clone()
    with lorc.compress(model, lorc.LorcConfig(rho=0.5)) as handle:
        split = attention.qkv_proj
        assert torch.equal(split.q_proj.weight, want[: 8 * 64]) and split.k_proj.rank == split.v_proj.rank == 32
        held = {p.untyped_storage().data_ptr() for p in split.parameters()}
        assert fused.weight.untyped_storage().data_ptr() not in held
        assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in split.parameters())
        stats = handle.stats()
        kept = sum(p.numel() for p in (*split.parameters(), *attention.o_proj.parameters()))
        assert stats["weight_bytes_after"] == 4 * kept < stats["weight_bytes_before"] == 4 * (1024 + 512) * 512
    assert attention.qkv_proj is fused and torch.equal(fused.weight, want)


def test_a_quantised_fused_projection_is_refused():
    model = tiny_model("phi3", num_hidden_layers=1)
    model.model.layers[0].self_attn.qkv_proj = type("Linear4bit", (torch.nn.Linear,), {})(512, 1024)
    with pytest.raises(NotImplementedError, match=r"^uncomp\.lorc: qkv_proj of layer 0 of Phi3Attention is a Linear4b"):
        lorc.compress(model)
    model.model.layers[0].self_attn.qkv_proj = torch.nn.Linear(512, 1000)
    with pytest.raises(NotImplementedError, match="qkv_proj of layer 0 of Phi3Attention must give 1024 channels"):
        lorc.compress(model)


def test_gemma_keeps_its_sliding_layers():
    model = tiny_model("gemma3_text")
    with lorc.compress(model) as handle:
        assert handle.layers == [1, 3] and len(handle.ranks.key) == 2
        assert type(model.model.layers[0].self_attn.k_proj) is torch.nn.Linear


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_whitening_lowers_the_error_on_the_tokens_it_saw(family):
    config = {"rank_k": 32, "rank_v": 32}
    model = tiny_model(family)
    want, ids = logits(model), prompt(columns=40)[0]
    errors = []
    for fields, tokens in (({}, None), ({"whiten": "calib"}, ids)):
        with lorc.compress(model, lorc.LorcConfig(**config, **fields), calibration=tokens):
            errors.append(float((logits(model) - want).norm()))
    assert errors[1] < errors[0]
    assert torch.equal(logits(model), want)


def test_calibration_knows_no_dropout():
    tokens, made = prompt()[0], []
    for training in (False, True):
        model = tiny_model("llama", num_hidden_layers=2, attention_dropout=0.5).train(training)
        lorc.compress(model, lorc.LorcConfig(rho=0.5, whiten="calib"), calibration=tokens)
        assert model.training is training and model.model.layers[1].mlp.training is training
        made.append(model.model.layers[1].self_attn.k_proj.down)
    assert torch.equal(*made)


def test_weights_shrink_and_are_counted():
    """E 256, Hq 8, Hkv 4, D 64, half rank: keys 4 (256 * 32 + 32 * 64), values 256 * 128, output 256 * 256 numbers."""
    model = tiny_model("llama", num_hidden_layers=1, hidden_size=256)
    with lorc.compress(model, lorc.LorcConfig(rank_k=32, rank_v=32), keep_weights=True) as handle:
        stats = handle.stats()
        attention = model.model.layers[0].self_attn
        held = sum(p.numel() for n in ("k_proj", "v_proj", "o_proj") for p in getattr(attention, n).parameters())
    assert stats["weight_bytes_after"] == 4 * held == 4 * (4 * (256 * 32 + 32 * 64) + 256 * 128 + 256 * 256)
    assert stats["weight_bytes_before"] == 4 * (2 * 256 * 256 + 512 * 256)


def test_progress_and_schedule_follow_the_model():
    """The layer whose keys have one small singular value makes the condition numbers, and all above it keep more."""
    model, said = tiny_model("llama"), []
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.k_proj.weight
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        values[-1] *= 1e-5
        weight.copy_(left * values @ right)
    with lorc.compress(model, lorc.LorcConfig(rho=0.5), progress=said.append) as handle:
        assert handle.ranks.key[:2] == (48, 48) and max(handle.ranks.key[2:]) < 48
        assert handle.log_kappa[1] == pytest.approx(
            sum(map(lambda w: factors.log_kappa(w, 4, "layer"), (weight, _value(handle)))), rel=1e-6
        )
    assert said[0] == "condition numbers 1/4" and said[-1] == "layers 4/4"


def _value(handle):
    return next(m for _, name, m, _ in handle._before[3:6] if name == "v_proj").weight


def test_a_copy_of_a_compressed_model_stands_alone():
    model = tiny_model("llama", num_hidden_layers=1)
    handle = lorc.compress(model)
    twin, want = copy.deepcopy(model), logits(model)
    codec = twin.model.layers[0].self_attn.k_proj.codec
    assert codec.projection is twin.model.layers[0].self_attn.k_proj
    handle.remove()
    assert torch.equal(logits(twin), want)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_removal_follows_a_model_that_was_moved(family):
    model = tiny_model(family, num_hidden_layers=1)
    want = copy.deepcopy(model).bfloat16()
    handle = lorc.compress(model)
    model.bfloat16()
    handle.remove()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(want))


def test_removal_keeps_the_weights_of_a_model_that_was_emptied():
    model = tiny_model("llama", num_hidden_layers=1)
    key = model.model.layers[0].self_attn.k_proj.weight
    want, handle = key.detach().clone(), lorc.compress(model)
    model.to("meta")
    handle.remove()
    assert model.model.layers[0].self_attn.k_proj.weight is key and torch.equal(key, want)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=3)
    before, real = footprint(model), apply.values_of

    def fails(places, index, *args):
        if index == 2:
            raise KeyError("no memory")
        return real(places, index, *args)

    monkeypatch.setattr(apply, "values_of", fails)
    with pytest.raises(KeyError):
        lorc.compress(model)
    assert same(footprint(model), before)


@pytest.mark.parametrize(
    "fields", [{}, {"granularity": "layer"}, {"whiten": "calib"}, {"exact_prefill": True}], ids=str
)
def test_inference_mode_leaves_no_tensor_that_only_serves_there(fields):
    """Compressed, moved and given back inside of it, a model runs where gradients are on."""
    model, ids = tiny_model("llama", num_hidden_layers=2), prompt()[0]
    before = footprint(model)
    with torch.inference_mode():
        tokens = {"calibration": lorc.calibrate(model, ids)} if fields.get("whiten") else {}
        handle = lorc.compress(model, lorc.LorcConfig(rho=0.5, **fields), **tokens)
    assert model(ids).logits.requires_grad and not any(p.is_inference() for p in model.parameters())
    model.to(torch.bfloat16).to(torch.float32)
    with torch.inference_mode():
        handle.remove()
    assert model(ids).logits.requires_grad and not any(p.is_inference() for p in model.parameters())
    assert list(footprint(model)[0]) == list(before[0])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_model_of_inference_tensors_is_compressed_and_comes_back(mode):
    with torch.inference_mode():
        model = tiny_model("llama", num_hidden_layers=1)
        want = logits(model)
    with mode():
        handle = lorc.compress(model, lorc.LorcConfig(rho=0.5))
        assert not torch.equal(logits(model), want)
        handle.remove()
        assert torch.equal(logits(model), want)


@pytest.mark.parametrize(
    "line", ["import uncomp; uncomp.lorc", "import uncomp.lorc", "from uncomp.lorc import LorcConfig, compress"]
)
def test_lorc_is_reached_from_the_package(line):
    """In a process of its own, where nothing else has loaded it; and it gives all that the package behind it does."""
    more = "; import uncomp; print(uncomp.lorc.compress.__name__)"
    done = subprocess.run([sys.executable, "-c", line + more], capture_output=True, text=True, timeout=120)
    assert done.stdout == "compress\n", done.stderr
    assert uncomp.lorc is lorc and set(lorc.__all__) == set(transforms.lorc.__all__)
    assert all(getattr(lorc, name) is getattr(transforms.lorc, name) for name in lorc.__all__)
