# SPDX-License-Identifier: Apache-2.0
"""What a pruned prompt cannot give is refused in one line, and leaves model and cache as they were."""

from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForSequenceClassification, GenerationConfig

import uncomp
from hf.test_patch import footprint
from uncomp import PrefillPruning, UncompCache, UncompConfig
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf
STAGES = PrefillPruning(stages=[0, 2, 3], n_min=20)
CONFIG = UncompConfig(policy="full", prefill=STAGES)
TOKENS = 60


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def prompt(batch: int = 1, columns: int = TOKENS, seed: int = 1):
    return torch.randint(3, 199, (batch, columns), generator=torch.Generator().manual_seed(seed))


def generated(model, ids, **kwargs):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **kwargs)


# ---- what a caller asks
@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, r"logits_to_keep must be an integer from 1 to 8, because .*; got 0 \(all tokens\)"),
        ({"logits_to_keep": 9}, "logits_to_keep must be an integer from 1 to 8, .*; got 9"),
        ({"logits_to_keep": torch.tensor([3, 5])}, "logits_to_keep must be .* got Tensor"),
        ({"labels": prompt()}, "labels .a loss over the prompt. cannot be had: .* only the last 8 tokens"),
        ({"output_hidden_states": True, "logits_to_keep": 1}, "output_hidden_states cannot be had"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_all_logits_hidden_states_and_losses(model, asked, wanted):
    """The same call works on a prompt that is not pruned, and the cache of the refused one is still empty."""
    with uncomp.patch(model, CONFIG) as handle, torch.no_grad():
        cache = handle.new_cache()
        with pytest.raises(NotImplementedError, match=f"^uncomp: {wanted}"):
            model(prompt(), past_key_values=cache, **asked)
        out = model(prompt(), past_key_values=cache, logits_to_keep=1)
        assert torch.equal(out.logits, model(prompt(), logits_to_keep=1).logits)
        short = {k: v[:, :20] if k == "labels" else v for k, v in asked.items()}
        out = model(prompt()[:, :20], **short)
        assert (out.loss is not None) == ("labels" in asked)
        assert (out.hidden_states is not None) == ("output_hidden_states" in asked)


def test_a_config_that_asks_for_hidden_states(model):
    model.config.output_hidden_states = True
    try:
        with (
            uncomp.patch(model, CONFIG),
            torch.no_grad(),
            pytest.raises(NotImplementedError, match="output_hidden_states cannot be had"),
        ):
            model(prompt(), logits_to_keep=1)
    finally:
        model.config.output_hidden_states = False


@pytest.mark.parametrize("keep", [1, 3, 8])
def test_logits_of_the_newest_tokens(model, keep):
    """As many as always stay; they are those of the same tokens asked one by one."""
    with uncomp.patch(model, CONFIG), torch.no_grad():
        many = model(prompt(), logits_to_keep=8).logits
        some = model(prompt(), logits_to_keep=keep).logits
    assert some.shape == (1, keep, 199)
    torch.testing.assert_close(some, many[:, -keep:], atol=1e-5, rtol=0)
    with uncomp.patch(model, UncompConfig(policy="full", prefill=STAGES, window=12)), torch.no_grad():
        assert model(prompt(), logits_to_keep=12).logits.shape == (1, 12, 199)


def test_the_stack_alone_and_gradients(model):
    with uncomp.patch(model, CONFIG):
        with torch.no_grad(), pytest.raises(NotImplementedError, match="call the LlamaForCausalLM, not the LlamaModel"):
            model.model(prompt(), use_cache=True)
        with pytest.raises(NotImplementedError, match=r"without gradients: call under torch\.no_grad"):
            model(prompt(), logits_to_keep=1)
        assert model(prompt(), use_cache=False).logits.shape == (1, TOKENS, 199)  # no cache, nothing to prune for


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "assistant_model"])
def test_drafts(model, name):
    value = 4 if name.startswith("prompt") else tiny_model("llama")
    wanted = f"{name} must be left out where prompts are pruned, because the drafts .*; got (4|LlamaForCausalLM)$"
    with uncomp.patch(model, UncompConfig(decode="grow", prefill=PrefillPruning(stages=[0, 1], n_min=10))):
        with pytest.raises(NotImplementedError, match=wanted):
            generated(model, prompt(), **{name: value})
        assert generated(model, prompt()).shape == (1, TOKENS + 4)
    with uncomp.patch(model, UncompConfig(budget=1.0, decode="grow")):
        assert generated(model, prompt(), **{name: value}).shape == (1, TOKENS + 4)


def test_chunks(model):
    wanted = "prefill_chunk_size must be left out where prompts are pruned, because a chunk .*; got 16"
    ids = prompt()
    with uncomp.patch(model, CONFIG):
        with pytest.raises(NotImplementedError, match=wanted):
            generated(model, ids, prefill_chunk_size=16)
        with pytest.raises(NotImplementedError, match=wanted):
            generated(model, ids, generation_config=GenerationConfig(prefill_chunk_size=16))
        model.generation_config.prefill_chunk_size = 16
        try:
            with pytest.raises(NotImplementedError, match=wanted):
                generated(model, ids)
        finally:
            model.generation_config.prefill_chunk_size = None
        assert generated(model, ids).shape == (1, TOKENS + 4)
    assert "generate" not in vars(model)


# ---- what a model is
def test_models_whose_state_would_break():
    gemma = tiny_model("gemma3_text")
    before = footprint(gemma)
    for options in ({"skip_sliding": True}, {"skip_sliding": True, "policy": "uncomp_stage"}):
        with pytest.raises(NotImplementedError, match=r"full attention in all 4 layers, .*; gemma3_text has 2"):
            uncomp.patch(gemma, UncompConfig(**options, prefill=STAGES))
    with pytest.raises(NotImplementedError, match="all 4 layers of this mistral model use sliding-window attention"):
        uncomp.patch(tiny_model("mistral", sliding_window=16), CONFIG)
    assert footprint(gemma) == before


def test_stages_and_profiles_that_do_not_fit(model):
    before = footprint(model)
    for prefill, wanted in (
        (PrefillPruning(stages=[0, 2, 4]), r"stages must ascend from 0 to below 4 layers; got \[0, 2, 4\]"),
        (PrefillPruning(stages="fixed"), 'for a model of 4 layers; "fixed" is published for 32 and 40'),
        (PrefillPruning(), "no profile of this model comes with the package"),
    ):
        with pytest.raises(ValueError, match=wanted):
            uncomp.patch(model, UncompConfig(prefill=prefill))
        with pytest.raises(ValueError, match=wanted):
            UncompCache(model, UncompConfig(prefill=prefill))
    with pytest.raises(ValueError, match="no profile of this model"):
        uncomp.patch(model, UncompConfig(policy="uncomp_stage"))
    assert footprint(model) == before


def test_models_without_a_choice_of_logits(model):
    judge = AutoModelForSequenceClassification.from_config(model.config)
    for wrong in (judge, model.model):
        with pytest.raises(NotImplementedError, match=f"forward takes logits_to_keep; got {type(wrong).__name__}"):
            uncomp.patch(wrong, CONFIG)
        assert wrong.config._attn_implementation == "sdpa"


def test_a_cache_needs_a_patched_model(model):
    model.set_attn_implementation("uncomp")
    try:
        with torch.no_grad(), pytest.raises(NotImplementedError, match="a model that was patched with it"):
            model(prompt(), past_key_values=UncompCache(model, CONFIG), logits_to_keep=1)
    finally:
        model.set_attn_implementation("sdpa")
    wanted = r"prunes the prompt \(prefill\); patch the model with the same"
    with uncomp.patch(model, UncompConfig(policy="full")), torch.no_grad(), pytest.raises(ValueError, match=wanted):
        model(prompt(), past_key_values=UncompCache(model, CONFIG), logits_to_keep=1)


def test_layers_that_are_called_otherwise(model):
    """A tensor of every token that nobody shortens would meet shorter hidden states."""
    with uncomp.patch(model, CONFIG), torch.no_grad():
        with pytest.raises(NotImplementedError, match="does not know how to shorten token_kind of a decoder layer"):
            model(prompt(), logits_to_keep=1, token_kind=torch.zeros(1, TOKENS))
        assert model(prompt(), logits_to_keep=1).logits.shape == (1, 1, 199)


# ---- nothing is left behind
def test_removal_gives_back_the_very_same_model(model):
    ids = prompt()
    before, stock = footprint(model), generated(model, ids)
    with uncomp.patch(model, CONFIG):
        pruned = generated(model, ids)
    assert footprint(model) == before
    assert torch.equal(generated(model, ids), stock)
    with uncomp.patch(model, CONFIG):
        assert torch.equal(generated(model, ids), pruned)


def test_a_wrapped_generate_outlives_the_patch(model):
    handle = uncomp.patch(model, CONFIG)
    ours = model.generate
    model.generate = lambda *args, **kwargs: ours(*args, **kwargs)
    try:
        handle.remove()
        assert generated(model, prompt(), prefill_chunk_size=16).shape == (1, TOKENS + 4)
    finally:
        del model.generate


def test_an_error_inside_leaves_no_hook(model):
    def broken(*args):
        raise KeyError("inside")

    with uncomp.patch(model, CONFIG), torch.no_grad():
        before = footprint(model)
        hook = model.model.layers[3].register_forward_pre_hook(broken)
        with pytest.raises(KeyError):
            model(prompt(), logits_to_keep=1)
        hook.remove()
        assert footprint(model) == before
        assert model(prompt(), logits_to_keep=1).logits.shape == (1, 1, 199)


def test_threads_prune_their_own_prompts(model):
    """Hooks of one thread's prompt meet the forwards of another."""
    prompts = [prompt(seed=seed, columns=TOKENS + 7 * (seed % 3)) for seed in range(6)]
    with uncomp.patch(model, CONFIG), torch.no_grad():
        want = [model(ids, logits_to_keep=1).logits for ids in prompts]
        got: list[list] = [[] for _ in prompts]

        def work(i: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    got[i].append(model(prompts[i], logits_to_keep=1).logits)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for found, logits in zip(got, want, strict=True):
        assert len(found) == 5
        assert all(torch.equal(one, logits) for one in found)
