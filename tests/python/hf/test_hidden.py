# SPDX-License-Identifier: Apache-2.0
"""Hidden-state pruning: the values of the literal computation, under every policy, in batches, and in later turns."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from hidden_support import slow, stored

import uncomp
from uncomp import PrefillPruning, UncompConfig, known_policies
from uncomp.testing import tiny_model, tiny_model_types

pytestmark = pytest.mark.hf
LAYERS, TOKENS = 6, 160
STAGES = PrefillPruning(stages=[0, 2, 3, 5], n_min=40)
REACHED = [160, 160, 120, 80, 80, 40]
KINDS = [kind for kind in tiny_model_types() if kind != "gemma3_text"]


@pytest.fixture
def model(models, device):
    if device not in models:
        models[device] = tiny_model("llama", num_hidden_layers=LAYERS).to(device)
    return models[device]


def prompt(device: str = "cpu", batch: int = 1, columns: int = TOKENS, seed: int = 1):
    return torch.randint(3, 199, (batch, columns), generator=torch.Generator().manual_seed(seed)).to(device)


def padded(device: str = "cpu", lengths=(160, 117, 30), columns: int = TOKENS + 3):
    """Prompts of different lengths; no row is without padding."""
    ids = prompt(device, len(lengths), columns)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        ids[row, : columns - n], mask[row, : columns - n] = 0, 0
    return ids, mask


def config(**options) -> UncompConfig:
    return UncompConfig(**{"policy": "full", "prefill": STAGES, **options})


@torch.no_grad()
def first(model, ids, mask=None, **options):
    """Output of a first forward."""
    if mask is not None:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, **{"logits_to_keep": 1, **options})


def run(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 10, "do_sample": False, **kwargs})


# ---- values
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_survivors_are_those_of_the_literal_computation(kind, device):
    model = tiny_model(kind, num_hidden_layers=LAYERS).to(device)
    ids = prompt(device)
    want, survivors = slow(model, ids, REACHED)
    with uncomp.patch(model, config()):
        out = first(model, ids)
    assert [stored(out.past_key_values, layer) for layer in range(LAYERS)] == survivors
    assert [len(s) for s in survivors] == REACHED
    torch.testing.assert_close(out.logits[0], want, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "changes", "reference"),
    [
        ({"hidden_queries": 1}, {}, {"queries": 1}),
        ({"hidden_queries": 20}, {}, {"queries": 20}),
        ({}, {"sinks": 4}, {"sinks": 4}),
        ({}, {"window": 24}, {"newest": 24}),
        ({"n_min": 12}, {"window": 16, "sinks": 3}, {"newest": 16, "sinks": 3}),
    ],
    ids=str,
)
def test_queries_window_and_sinks(model, device, options, changes, reference):
    ids = prompt(device)
    prefill = PrefillPruning(**{"stages": [0, 2, 3, 5], "n_min": 40, **options})
    with uncomp.patch(model, config(prefill=prefill, **changes)):
        out = first(model, ids)
        reached = [n for (n,) in out.past_key_values.uncomp.reached]
    want, survivors = slow(model, ids, reached, **reference)
    assert [stored(out.past_key_values, layer) for layer in range(LAYERS)] == survivors
    assert reached[-1] == max(options.get("n_min", 40), reference.get("newest", 8) + reference.get("sinks", 0))
    torch.testing.assert_close(out.logits[0], want, atol=5e-5, rtol=0)


def test_half_precision(device):
    """Half precision turns near ties, so survivors overlap and logits are close."""
    model = tiny_model("llama", num_hidden_layers=LAYERS).to(device, torch.bfloat16)
    ids = prompt(device)
    want, survivors = slow(model, ids, REACHED)
    with uncomp.patch(model, config()):
        out = first(model, ids)
    for layer, alive in enumerate(survivors):
        held = stored(out.past_key_values, layer)
        assert len(held) == len(alive)
        assert len({*held} & {*alive}) >= 0.8 * len(alive)
    assert torch.cosine_similarity(out.logits[0, 0].float(), want[0].float(), dim=0) > 0.97


@pytest.mark.parametrize("n_min", [TOKENS, TOKENS + 1, 10**6, 1.0])
@pytest.mark.parametrize("policy", ["full", "uncomp"])
def test_short_prompts_are_untouched(model, device, n_min, policy):
    """Not close but equal, all logits included: nothing of the pruning may run."""
    ids = prompt(device)
    with uncomp.patch(model, config(policy=policy, prefill=None)), torch.no_grad():
        want, text = model(ids).logits, run(model, ids)
    prefill = PrefillPruning(stages=[0, 2, 3, 5], n_min=n_min)
    with uncomp.patch(model, config(policy=policy, prefill=prefill)) as handle, torch.no_grad():
        assert torch.equal(model(ids).logits, want)
        assert torch.equal(run(model, ids), text)
        assert handle.stats()["reached_tokens"] is None


# ---- batches
@pytest.mark.parametrize(
    "options", [{}, {"policy": "uncomp", "budget": 32}, {"policy": "snapkv", "budget": 48}], ids=str
)
def test_a_batch_keeps_the_tokens_of_each_prompt_alone(model, device, options):
    lengths = (160, 117, 30)
    ids, mask = padded(device, lengths)
    with uncomp.patch(model, config(**options)):
        out = first(model, ids, mask)
        text = run(model, ids, mask)
        for row, n in enumerate(lengths):
            alone = first(model, ids[row : row + 1, -n:])
            for layer in range(LAYERS):
                for head in range(4):
                    assert stored(out.past_key_values, layer, row, head) == stored(
                        alone.past_key_values, layer, 0, head
                    ), (row, layer)
            torch.testing.assert_close(out.logits[row], alone.logits[0], atol=2e-5, rtol=0)
            assert torch.equal(text[row, -10:], run(model, ids[row : row + 1, -n:])[0, -10:])


def test_equal_lengths_need_no_padding(model, device):
    ids = prompt(device, 3)
    with uncomp.patch(model, config()):
        out = first(model, ids)
        for row in range(3):
            alone = first(model, ids[row : row + 1])
            torch.testing.assert_close(out.logits[row], alone.logits[0], atol=2e-5, rtol=0)
            assert stored(out.past_key_values, 5, row) == stored(alone.past_key_values, 5)


def test_holes_in_a_mask(model, device):
    """Real tokens need not be neighbours: their places are counted without the holes."""
    ids = prompt(device, 2, TOKENS + 9)
    mask = torch.ones_like(ids)
    mask[0, [0, 5, 6, 7, 40, 41, 90, 130, 150]] = 0
    mask[1, :9] = 0
    with uncomp.patch(model, config()):
        out = first(model, ids, mask)
        for row in range(2):
            alone = first(model, ids[row : row + 1, mask[row].bool()])
            for layer in range(LAYERS):
                assert stored(out.past_key_values, layer, row) == stored(alone.past_key_values, layer), (row, layer)
            torch.testing.assert_close(out.logits[row], alone.logits[0], atol=2e-5, rtol=0)


# ---- policies on top
@pytest.mark.parametrize("policy", known_policies())
@pytest.mark.parametrize("options", [{}, {"decode": "grow"}, {"rows": "query_head"}], ids=str)
def test_every_policy_stores_what_has_reached_its_layer(model, device, policy, options):
    ids, mask = padded(device)
    with uncomp.patch(model, config(policy=policy, budget=36, **options)) as handle:
        out = first(model, ids, mask)
        plan = out.past_key_values.uncomp.compressor.policy
        for layer, reached in enumerate(out.past_key_values.uncomp.reached):
            held = out.past_key_values.uncomp.layers[layer].ragged
            planned = [min(t, held.rows * n) for t, n in zip(plan.totals(layer, reached), reached, strict=True)]
            assert held.row_len.view(3, -1).sum(1).tolist() == planned
            for sequence, n in enumerate((160, 117, 30)):
                for row in range(held.rows):
                    kept = stored(out.past_key_values, layer, sequence, row)
                    assert kept == sorted(set(kept))
                    assert kept[-1] == n - 1  # the last prompt token is present in every layer
        assert run(model, ids, mask).shape == (3, TOKENS + 3 + 10)
        stats = handle.stats()
        assert stats["logical_tokens"] == TOKENS + 3 + 9
        assert stats["real_tokens"] == [169, 126, 39]
        assert stats["reached_tokens"][0] == [160, 117, 30]
        assert stats["reached_tokens"][-1] == [40, 40, 30]


OPTIONS = {
    "share": {"policy": "uncomp", "budget": 0.25},
    "pyramid": {"policy": "uncomp", "budget": 36, "layer_shape": "pyramid"},
    "model": {"policy": "uncomp", "budget": 36, "group_scope": "model"},
    "model, more than a layer has": {"policy": "uncomp", "budget": 90, "group_scope": "model", "groups": 4},
    "tuned": {"preset": "tuned", "budget": 36},
    "tuned-hits": {"preset": "tuned-hits", "budget": 36},
    "entropy": {"policy": "uncomp", "budget": 36, "shape": "entropy"},
    "extreme": {"policy": "uncomp", "budget": 36, "extreme": 12},
    "deleted": {"policy": "uncomp", "budget": 36, "delete_heads": 2},
    "sinks": {"policy": "snapkv", "budget": 36, "window": 8, "sinks": 4},
    "grows": {"policy": "uncomp", "budget": 36, "decode": "grow", "extend": "append"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_plans_hold_where_layers_differ_in_length(model, device, name):
    """Stored tokens are the plan's, cut to what a row has; newest tokens and sinks are there; turns go on."""
    made = UncompConfig(**OPTIONS[name], prefill=STAGES)
    ids, mask = padded(device)
    lengths = (160, 117, 30)
    with uncomp.patch(model, made) as handle:
        cache = first(model, ids, mask).past_key_values
        plan, whole = cache.uncomp.compressor.policy, cache.uncomp.compressor.whole_model
        limits = torch.zeros(3, dtype=torch.long)
        totals = torch.zeros(3, dtype=torch.long)
        for layer, reached in enumerate(cache.uncomp.reached):
            held = cache.uncomp.layers[layer].ragged
            deleted = made.delete_heads
            totals += torch.tensor(plan.totals(layer, reached))
            limits += held.limit.sum(1).cpu()
            for sequence, n in enumerate(reached):
                rows = [stored(cache, layer, sequence, row) for row in range(held.rows)]
                assert [len(row) for row in rows] == [min(b, n) for b in held.limit[sequence].tolist()]
                for row in rows:
                    assert row == sorted(set(row))
                    assert row[-made.window :] == list(range(lengths[sequence] - made.window, lengths[sequence]))
                    assert row[: made.sinks] == list(range(made.sinks))
            assert held.rows == 4 - deleted
            if not whole:
                assert torch.equal(held.limit.sum(1).cpu().long(), torch.tensor(plan.totals(layer, reached)))
        assert torch.equal(limits, totals)
        if name == "share":
            assert cache.uncomp.layers[5].ragged.limit.sum(1).tolist() == [40, 40, 4 * 8]
        out = run(model, ids, mask, return_dict_in_generate=True)
        more = torch.cat([out.sequences, prompt(device, 3, 5, seed=7)], 1)
        longer = torch.cat([mask, mask.new_ones(3, 15)], 1)
        again = run(model, more, longer, past_key_values=out.past_key_values, max_new_tokens=4)
        assert again.shape == (3, TOKENS + 3 + 10 + 5 + 4)
        assert handle.stats()["real_tokens"] == [n + 18 for n in lengths]


def test_published_stages_of_a_deep_model(device):
    """2, 13, 11, 5 and 1 layers, and those of 40; shares stand for thousands of tokens."""
    for layers, tokens in ((32, [160, 130, 100, 70, 40]), (40, [160, 142, 125, 108, 91, 74, 57, 40])):
        deep = tiny_model("llama", num_hidden_layers=layers, hidden_size=32, intermediate_size=32).to(device)
        ids = prompt(device)
        with uncomp.patch(deep, config(prefill=PrefillPruning(stages="fixed", n_min=0.25))) as handle:
            out = first(deep, ids)
            reached = [n for (n,) in handle.stats()["reached_tokens"]]
        assert list(dict.fromkeys(reached)) == tokens
        want, survivors = slow(deep, ids, reached)
        assert [stored(out.past_key_values, layer) for layer in range(layers)] == survivors
        torch.testing.assert_close(out.logits[0], want, atol=1e-4, rtol=0)


def test_embeddings_are_prompts_too(model, device):
    ids = prompt(device)
    with uncomp.patch(model, config(policy="uncomp", budget=36)):
        want = run(model, ids)[:, TOKENS:]
        embeds = model.get_input_embeddings()(ids).detach()
        assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=10, do_sample=False), want)
