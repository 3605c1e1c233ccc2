# SPDX-License-Identifier: Apache-2.0
"""Latents that several heads share: what they compute, what a cache stores of them, and which policies can run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from graph_support import NEW, both, padded, run
from lorc_support import difference, generated, prompt, with_biases

import uncomp
from uncomp import latent, lorc
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf
GRAINS = {"group:2": 2, "layer": 4, "group:4": 4}


def low_rank(grain: str, family: str = "qwen2", **fields):
    model = with_biases(tiny_model(family, num_hidden_layers=2))
    return model, lorc.compress(model, lorc.LorcConfig(**{"rank_k": 32, "rank_v": 48, **fields}, granularity=grain))


def dense_twin(grain: str, family: str = "qwen2"):
    """A compressed model, and one of ordinary width with the projections that its factors multiply to."""
    model, handle = low_rank(grain, family)
    twin = with_biases(tiny_model(family, num_hidden_layers=2))
    for ours, theirs in zip(model.model.layers, twin.model.layers, strict=True):
        ours = getattr(ours.self_attn, "qkv_proj", ours.self_attn)
        for name in ("k_proj", "v_proj"):
            made = getattr(ours, name)
            narrow = made.down.view(made.heads, made.rank, -1)
            weight = (made.basis.mT @ narrow).flatten(0, 1)
            with torch.no_grad():
                if hasattr(theirs.self_attn, "qkv_proj"):
                    start = 8 * 64 + (4 * 64 if name == "v_proj" else 0)
                    theirs.self_attn.qkv_proj.weight[start : start + 4 * 64] = weight
                else:
                    getattr(theirs.self_attn, name).weight.copy_(weight)
    return model, handle, twin


# ---- what is computed
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3"])
def test_full_rank_is_the_original_model(grain, family):
    model = with_biases(tiny_model(family, num_hidden_layers=2))
    ids, mask = prompt()
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[mask.bool()]
        before = {name: id(module) for name, module in model.named_modules()}
        with lorc.compress(model, lorc.LorcConfig(rho=1.0, granularity=grain)) as handle:
            got = model(ids, attention_mask=mask).logits[mask.bool()]
            assert handle.stats()["kept_share"] == 1.0
    assert (got - want).abs().max() < 2e-5 * want.abs().max()
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_shared_latents_err_less_at_equal_width():
    """Weights of all heads at once: the joint factors of one width are never worse in the Frobenius norm."""
    errors = []
    for grain in ("head", "group:2", "layer"):
        model, stock = low_rank(grain)[0], with_biases(tiny_model("qwen2", num_hidden_layers=2))
        made, weight = model.model.layers[0].self_attn.k_proj, stock.model.layers[0].self_attn.k_proj.weight
        product = (made.basis.mT @ made.down.view(made.heads, made.rank, -1)).flatten(0, 1)
        errors.append(float((product - weight).detach().norm()))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("fields", [{"svd": "randomised"}, {"whiten": "calib"}], ids=["randomised", "whitened"])
def test_other_ways_to_the_factors(fields):
    model = tiny_model("phi3", num_hidden_layers=1)
    ids = prompt()[0]
    tokens = {"calibration": ids} if "whiten" in fields else {}
    with torch.no_grad():
        want, errors = model(ids).logits, []
        for config in (fields, {}):
            config = lorc.LorcConfig(rho=0.5, granularity="layer", **config)
            with lorc.compress(model, config, **(tokens if config.whiten else {})):
                errors.append(float((model(ids).logits - want).norm()))
    assert errors[0] < 1.05 * errors[1]


def test_a_model_that_runs_another_attention_keeps_the_latents_of_one_layer_at_most():
    """No output projection drops what nobody took where values are made again; later layers do."""
    model, _ = low_rank("layer")
    latent.forget()
    with torch.no_grad():
        model(prompt()[0], use_cache=False)
    assert len(latent._slot.latents) <= 2


# ---- under a policy
POLICIES = {
    "full": {"policy": "full", "max_new_tokens": 32},
    "streaming": {"policy": "streaming_llm", "budget": 40},
    "streaming_grows": {"policy": "streaming_llm", "budget": 40, "decode": "grow", "max_new_tokens": 32},
    "random_grows": {"policy": "random", "budget": 1.0, "max_new_tokens": 32},
}


@pytest.mark.parametrize("grain", ["group:2", "layer"])
@pytest.mark.parametrize("name", POLICIES)
def test_shared_rows_are_full_width_under_the_same_policy(grain, name):
    """A padded batch, then a later turn."""
    model, _, dense = dense_twin(grain)
    ids, mask = prompt()
    found = []
    for each in (model, dense):
        with uncomp.patch(each, uncomp.UncompConfig(**POLICIES[name])) as handle, torch.no_grad():
            first = generated(each, ids, mask)
            longer = torch.cat([first.sequences, prompt(columns=9, seed=4)[0]], 1)
            seen = torch.cat([mask, mask.new_ones(2, longer.shape[1] - mask.shape[1])], 1)
            second = generated(each, longer, seen, past_key_values=first.past_key_values)
            found.append((first, second, handle.stats()))
    assert max(difference(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True)) < 1e-5
    got, want = found[0][2], found[1][2]
    shared = 2 if grain == "group:2" else 4
    assert (got["key_road"], want["key_road"]) == (f"torch: {shared} heads share what is stored", None)
    assert got["stored_tokens_mean"] == want["stored_tokens_mean"]
    if "budget" in POLICIES[name] and name == "streaming":
        assert got["cache_bytes"] == 4 * 2 * 2 * 4 * 40 * (32 + 48) and want["cache_bytes"] == 4 * 2 * 2 * 4 * 40 * 128


@pytest.mark.parametrize("grain", ["group:2", "layer"])
def test_a_turn_behind_a_prompt_that_fills_no_row(grain):
    """Chunks shorter than the budget: rows then have fewer tokens than the plan grants them."""
    model, _, dense = dense_twin(grain)
    found = []
    for each in (model, dense):
        with uncomp.patch(each, uncomp.UncompConfig(**POLICIES["streaming"])), torch.no_grad():
            found.append(generated(each, *prompt(), prefill_chunk_size=9))
    assert difference(*found) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_normalised_and_fused_keys(family):
    model, _, dense = dense_twin("layer", family)
    found = []
    for each in (model, dense):
        with uncomp.patch(each, uncomp.UncompConfig(**POLICIES["streaming"])):
            found.append(generated(each, *prompt()))
    assert difference(*found) < 1e-5


def test_random_rows_of_a_group_keep_the_same_tokens():
    model, _ = low_rank("group:2")
    config = uncomp.UncompConfig(policy="random", budget=40, decode="grow", max_new_tokens=32)
    with uncomp.patch(model, config) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt()[0], past_key_values=cache)
        ragged = cache.uncomp.layers[0].ragged
        assert ragged.rows == 2 and ragged.key_rows.shape[1] == 64 and ragged.value_rows.shape[1] == 96
        assert generated(model, *prompt()).sequences.shape == (2, 76)


@pytest.mark.parametrize("name", ["full", "streaming"])
def test_steps_are_recorded(device, name):
    model = low_rank("group:2")[0].to(device)
    ids, mask = padded(device)
    assert both(model, lambda h: run(model, ids, mask), **POLICIES[name])["steps_replayed"] == NEW - 2


def test_an_exact_prompt():
    model, _ = low_rank("layer", exact_prefill=True)
    stock = with_biases(tiny_model("qwen2", num_hidden_layers=2))
    ids, mask = prompt()
    with uncomp.patch(model, uncomp.UncompConfig(policy="full")), torch.no_grad():
        got = model(ids, attention_mask=mask, use_cache=True).logits[mask.bool()]
        assert (got - stock(ids, attention_mask=mask).logits[mask.bool()]).abs().max() < 1e-5
        assert generated(model, ids, mask).sequences.shape == (2, 76)


def test_one_cache_after_the_other():
    """A cache that is used again after the factors were removed stores a row for every head again."""
    model, handle = low_rank("layer")
    with uncomp.patch(model, uncomp.UncompConfig(policy="full")) as patched, torch.no_grad():
        cache, ids = patched.new_cache(), prompt()[0]
        model(ids, past_key_values=cache)
        assert cache.uncomp.layers[0].ragged.rows == 1
        cache.reset()
        handle.remove()
        model(ids, past_key_values=cache)
        assert cache.uncomp.layers[0].ragged.rows == 4


# ---- checkpoints
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_a_checkpoint_comes_back(tmp_path, family):
    model, handle = low_rank("group:2", family)
    handle.save_pretrained(tmp_path / "small")
    other = with_biases(tiny_model(family, num_hidden_layers=2))
    assert lorc.attach(other, tmp_path / "small").config.granularity == "group:2"
    with torch.no_grad():
        assert torch.equal(other(prompt()[0]).logits, model(prompt()[0]).logits)


# ---- refusals
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"policy": "uncomp"}, "policy uncomp keeps what single heads attend to, but 4 heads share"),
        ({"policy": "snapkv", "decode": "grow"}, "policy snapkv keeps what single heads attend to"),
        ({"policy": "random"}, "policy random keeps what single heads attend to"),
        ({"policy": "full", "rows": "query_head"}, 'rows must be "kv_head" where heads share latents'),
    ],
)
def test_policies_that_tell_heads_apart_are_refused(options, text):
    model, _ = low_rank("layer")
    config = uncomp.UncompConfig(**{"budget": 40, **options})
    with uncomp.patch(model, config), pytest.raises(NotImplementedError, match=rf"^uncomp: {text}"):
        model(prompt()[0], use_cache=True)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"granularity": "group:1"}, "granularity must be"),
        ({"granularity": "group:02"}, "granularity must be"),
        ({"granularity": "heads"}, "granularity must be"),
        ({"granularity": "layer", "key_mode": "absorb"}, "key_mode must be"),
        ({"granularity": "layer", "threshold": 1.0}, "threshold must be left out"),
        ({"granularity": "group:3"}, "granularity must be groups that divide the model's 4 key/value heads"),
    ],
)
def test_grains_that_do_not_fit_are_refused(fields, text):
    model = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match=rf"^uncomp\.LorcConfig: {text}"):
        lorc.compress(model, lorc.LorcConfig(**fields))
    assert not hasattr(model.model, "_uncomp_lorc")
