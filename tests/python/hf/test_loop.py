# SPDX-License-Identifier: Apache-2.0
"""handle.generate: the tokens of stock generate on the same patched model, recorded or not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from graph_support import ReplayMachine, padded, prompt

import uncomp
from uncomp.hf.choice import Choice
from uncomp.hf.loop import BLOCK
from uncomp.testing import tiny_model, tiny_model_types

pytestmark = pytest.mark.hf
NEW = 2 * BLOCK + 5


def patched(model, **options):
    handle = uncomp.patch(model, uncomp.UncompConfig(**{"budget": 48, **options}))
    if model.device.type == "cpu" and options.get("graph") != "off":
        ReplayMachine(handle)
    return handle


# ---- values
@pytest.mark.parametrize("graph", ["auto", "off"])
@pytest.mark.parametrize(
    "options", [{}, {"decode": "grow", "max_new_tokens": 9}, {"policy": "full"}, {"policy": "h2o"}], ids=str
)
def test_greedy_tokens_are_those_of_stock_generate(model, device, options, graph):
    ids, mask = padded(device)
    with patched(model, graph=graph, **options) as handle:
        want = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
        before = handle.stats()["steps_replayed"]
        for _ in range(2):
            assert torch.equal(handle.generate(ids, mask, max_new_tokens=NEW), want)
        stats = handle.stats()
    assert stats["steps_replayed"] - before == (0 if graph == "off" else 2 * (NEW - 1) - 1)


@pytest.mark.parametrize("kind", tiny_model_types())
def test_every_family(device, kind):
    family = tiny_model(kind).to(device)
    with patched(family, skip_sliding=True) as handle:
        want = family.generate(prompt(device), do_sample=False, max_new_tokens=9)
        assert torch.equal(handle.generate(prompt(device), max_new_tokens=9), want)


@pytest.mark.parametrize("new", [1, 2, BLOCK, BLOCK + 1])
def test_every_length(model, device, new):
    with patched(model) as handle:
        want = model.generate(prompt(device), do_sample=False, max_new_tokens=new)
        assert torch.equal(handle.generate(prompt(device), max_new_tokens=new), want)


@pytest.mark.parametrize("graph", ["auto", "off"])
@pytest.mark.parametrize("options", [{"budget": 24}, {"budget": 24, "decode": "grow"}, {"budget": 1.0}], ids=str)
def test_a_turn_behind_an_end_token_continues_what_stock_generate_left(model, device, options, graph):
    ids, behind = prompt(device), torch.arange(50, 55, device=device)[None]
    with patched(model, graph=graph, **options) as handle:
        new = handle.generate(ids, max_new_tokens=30, eos_token_id=[])[0, ids.shape[1] :].tolist()
        end = next(new[i] for i in range(4, 14) if new[i] not in new[:i])
        caches, first, second = [handle.new_cache(), handle.new_cache()], [], []
        mask = torch.ones_like(ids)
        given = {"max_new_tokens": 30, "eos_token_id": end, "pad_token_id": 0}
        first.append(model.generate(ids, attention_mask=mask, past_key_values=caches[0], do_sample=False, **given))
        first.append(handle.generate(ids, past_key_values=caches[1], **given))
        assert torch.equal(*first)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == first[0].shape[1] - 1
        for cache in caches:
            turn = torch.cat([first[0][:, -1:], behind], 1)
            second.append(handle.generate(turn, past_key_values=cache, max_new_tokens=8, eos_token_id=[]))
        assert torch.equal(*second)


def test_models_that_do_not_generate_are_refused(model, device):
    with pytest.raises(TypeError, match=r"uncomp\.generate: model must be a model of transformers; got Linear"):
        uncomp.generate(torch.nn.Linear(2, 2), prompt(device))
    with uncomp.patch(model.model) as handle, pytest.raises(TypeError, match=r"uncomp\.generate: .* has no head"):
        handle.generate(prompt(device))


def test_an_exception_in_on_tokens_leaves_what_was_given_in_the_cache(model, device):
    ids, given = prompt(device), []

    def stop(tokens):
        given.append(tokens)
        if len(given) == 2:
            raise KeyboardInterrupt

    with patched(model, budget=24) as handle:
        cache = handle.new_cache()
        with pytest.raises(KeyboardInterrupt):
            handle.generate(ids, max_new_tokens=NEW, eos_token_id=[], past_key_values=cache, on_tokens=stop)
        assert cache.get_seq_length() == ids.shape[1] + sum(tokens.shape[1] for tokens in given) - 1


def test_ends_where_stock_generate_ends(model, device):
    ids, mask = padded(device)
    with patched(model) as handle:
        free = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)[:, ids.shape[1] :]
        for eos in ([int(free[0, 20])], [int(t) for t in free[:, 9]], [int(free[0, 0])], [int(t) for t in free[:, 0]]):
            want = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0
            )
            got = handle.generate(ids, mask, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0)
            assert torch.equal(got, want), eos


def test_padded_batch_beside_layers_that_keep_padding(device):
    """Sliding layers are left to transformers, whose cache holds the padding: they need the mask."""
    family = tiny_model("gemma3_text").to(device)
    ids = prompt(device, 2, 12)
    mask = torch.ones_like(ids)
    ids[1, :8], mask[1, :8] = 0, 0
    with patched(family, skip_sliding=True) as handle:
        want = family.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
        assert torch.equal(handle.generate(ids, mask, max_new_tokens=NEW), want)


def test_blocks_stop_where_the_last_sequence_ends(model, device):
    ids, mask = padded(device)
    seen = []
    with patched(model) as handle:
        free = handle.generate(ids, mask, max_new_tokens=NEW)[:, ids.shape[1] :]
        eos = [int(t) for t in free[:, 20]]
        out = handle.generate(ids, mask, max_new_tokens=NEW, eos_token_id=eos, on_tokens=seen.append)
    assert torch.equal(torch.cat(seen, 1), out[:, ids.shape[1] :].cpu())


def test_what_the_generation_config_asks_for_and_is_not_applied_is_said(model, device, recwarn):
    with patched(model) as handle:
        handle.generate(prompt(device), max_new_tokens=2)
        assert not [w for w in recwarn if "generation_config" in str(w.message)]
        model.generation_config.repetition_penalty = 1.5
        try:
            with pytest.warns(UserWarning, match="repetition_penalty=1.5 of the model's generation_config"):
                handle.generate(prompt(device), max_new_tokens=2)
        finally:
            model.generation_config.repetition_penalty = None


def test_after_removal(model, device):
    with patched(model) as handle:
        pass
    with pytest.raises(RuntimeError, match="the patch was removed"):
        handle.generate(prompt(device))


def test_blocks_arrive_in_order(model, device):
    seen = []
    with patched(model) as handle:
        out = handle.generate(prompt(device), max_new_tokens=NEW, on_tokens=seen.append)
    assert [block.shape[1] for block in seen] == [1, BLOCK, BLOCK, 4]
    assert torch.equal(torch.cat(seen, 1), out[:, -NEW:].cpu())


# ---- sampling
def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -float("inf")]]).expand(20000, -1)
    wants = {
        Choice(True): logits[0].softmax(-1),
        Choice(True, temperature=0.5): (2 * logits[0]).softmax(-1),
        Choice(True, top_k=2): torch.tensor([2.0, 1.0]).softmax(-1),
        Choice(True, top_p=0.85): torch.tensor([2.0, 1.0]).softmax(-1),
        Choice(True, top_p=0.01): torch.tensor([1.0]),
    }
    for choice, want in wants.items():
        share = torch.bincount(choice(logits).flatten(), minlength=5) / 20000
        torch.testing.assert_close(share[: len(want)], want[:5], atol=0.015, rtol=0)
        assert share[len(want) :].sum() == 0


def test_sampling_repeats_with_the_seed(model, device):
    with patched(model) as handle:
        runs = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            runs.append(handle.generate(prompt(device), max_new_tokens=NEW, do_sample=True))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# ---- memory, turns
def test_a_failed_request_leaves_the_next_one_alone(model, device):
    with patched(model) as handle:
        want = handle.generate(prompt(device), max_new_tokens=NEW)

        def stop(tokens):
            raise KeyError("enough")

        with pytest.raises(KeyError):
            handle.generate(prompt(device), max_new_tokens=NEW, on_tokens=stop)
        assert torch.equal(handle.generate(prompt(device), max_new_tokens=NEW), want)


def test_function_patches_for_one_call(model, device):
    config = uncomp.UncompConfig(budget=48)
    with uncomp.patch(model, config) as handle:
        want = handle.generate(prompt(device), max_new_tokens=5)
        assert torch.equal(uncomp.generate(model, prompt(device), max_new_tokens=5), want)
        with pytest.raises(ValueError, match="patched already"):
            uncomp.generate(model, prompt(device), config=config)
    assert torch.equal(uncomp.generate(model, prompt(device), config=config, max_new_tokens=5), want)
    assert model.config._attn_implementation != "uncomp"


def test_a_prompt_behind_a_filled_cache(model, device):
    """As stock generate goes on with it: padded sequences whose first parts differ in length."""
    ids = prompt(device, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[1, 60:63] = 0  # padding of the second part
    with patched(model) as handle:
        tokens = []
        for stock in (True, False):
            cache = handle.new_cache()
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, :60]
            with torch.no_grad():
                model(ids[:, :60], attention_mask=mask[:, :60], position_ids=positions, past_key_values=cache)
            options = {"attention_mask": mask, "max_new_tokens": 6, "past_key_values": cache}
            if stock:
                tokens.append(model.generate(ids, do_sample=False, **options)[:, ids.shape[1] :])
            else:
                tokens.append(handle.generate(ids[:, 60:], **options)[:, ids.shape[1] - 60 :])
    assert torch.equal(*tokens)


# ---- errors
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be a number of at least 0.0001"),
        ({"temperature": None}, "temperature must be a number of at least 0.0001"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id; got 'x'"),
        ({"pad_token_id": [0]}, r"pad_token_id must be a token id; got \[0\]"),
        ({"attention_mask": [1]}, "input_ids and attention_mask must be tensors; got Tensor and list"),
        ({"top_k": -1}, "top_k must be an integer of at least 0"),
        ({"top_p": 1.5}, r"top_p must be a number in \(0, 1\]; got 1.5"),
        ({"past_key_values": object()}, r"past_key_values must come from handle.new_cache\(\); got object"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask must be \[1, 90\] as input_ids is; got \[1, 3\]"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_arguments_that_cannot_be(model, device, options, text):
    with patched(model) as handle, pytest.raises(ValueError, match=text):
        handle.generate(prompt(device), **options)


def test_prompts_that_are_none(model, device):
    with patched(model) as handle:
        for bad in (torch.zeros(1, 0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4)):
            with pytest.raises(ValueError, match=r"input_ids must be \[B, S\] int64"):
                handle.generate(bad.to(device))
