# SPDX-License-Identifier: Apache-2.0
"""A compressed model under patch: rows of latents give what a model of full width gives under the same policy."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from lorc_support import by_torch, compressed_and_dense, difference, generated, prompt, with_biases

import uncomp
from uncomp import lorc
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf
BUDGET = 40


@pytest.fixture(scope="module")
def pair():
    return compressed_and_dense("qwen2", lorc.LorcConfig(rank_k=(48, 16), rank_v=(32, 48)), num_hidden_layers=2)


def config(policy: str, **fields) -> uncomp.UncompConfig:
    if policy == "uncomp_stage":
        fields["prefill"] = uncomp.PrefillPruning(stages=(0, 1), n_min=50)
    return uncomp.UncompConfig(policy=policy, budget=1.0 if policy == "full" else BUDGET, **fields)


def both(pair, cfg, run):
    """What `run(model, handle)` gives for the compressed model and for the dense one."""
    found = []
    for model in (pair[0], pair[2]):
        with uncomp.patch(model, cfg) as handle, torch.no_grad():
            found.append(run(model, handle))
    return found


# ---- every policy
@pytest.mark.parametrize("policy", ["uncomp", "tova", "streaming_llm", "full"])
@pytest.mark.parametrize("decode", ["evict", "grow"])
def test_keys_that_torch_makes_are_those_of_kernels(pair, device, policy, decode):
    cfg, found, roads = config(policy, decode=decode, max_new_tokens=32), [], []
    model = copy.deepcopy(pair[0]).to(device)
    for change in (lambda model: model, by_torch):
        with uncomp.patch(change(copy.deepcopy(model)), cfg) as handle:
            found.append(generated(handle._model, *(t.to(device) for t in prompt())))
            roads.append(handle.stats()["key_road"])
    assert difference(*found) < (1e-5 if device == "cpu" else 1e-3)
    weighs = policy == "tova" and decode == "evict"
    assert roads[1] == "torch: a test says so" and (weighs or roads[0] == "kernel")


@pytest.mark.parametrize("policy", uncomp.known_policies())
@pytest.mark.parametrize("decode", ["evict", "grow"])
def test_latents_under_a_policy_are_full_width_under_it(pair, policy, decode):
    """A padded batch, then a later turn: selection, votes and evictions see rebuilt keys."""
    ids, mask = prompt()

    def run(model, handle):
        first = generated(model, ids, mask)
        longer = torch.cat([first.sequences, prompt(columns=9, seed=4)[0]], 1)
        seen = torch.cat([mask, mask.new_ones(2, longer.shape[1] - mask.shape[1])], 1)
        stored = handle.stats()["stored_tokens_mean"]
        return first, generated(model, longer, seen, past_key_values=first.past_key_values), stored

    got, want = both(pair, config(policy, decode=decode, max_new_tokens=32), run)
    assert torch.equal(got[1].sequences, want[1].sequences) and got[2] == want[2]
    assert max(difference(got[0], want[0]), difference(got[1], want[1])) < 1e-5


@pytest.mark.parametrize("policy", ["uncomp", "streaming_llm", "tova"])
def test_a_turn_behind_a_prompt_that_fills_no_row(pair, policy):
    """Chunks shorter than the budget, in a padded batch: rows then have fewer tokens than the plan grants them."""
    ids, mask = prompt()
    got, want = both(pair, config(policy), lambda model, _: generated(model, ids, mask, prefill_chunk_size=9))
    assert torch.equal(got.sequences, want.sequences) and difference(got, want) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma3_text"])
def test_keys_are_normalised_and_turned_as_each_family_does(family):
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3_text" else {}
    if family == "phi3":
        layers["partial_rotary_factor"] = 0.5
    pair = compressed_and_dense(family, num_hidden_layers=2, **layers)
    got, want = both(pair, config("uncomp", skip_sliding=True), lambda m, _: generated(m, *prompt()))
    assert difference(got, want) < 1e-5


def test_all_tokens_kept_are_the_unpatched_model(pair):
    want = generated(pair[0], *prompt())
    for rows in ("kv_head", "query_head"):
        with uncomp.patch(pair[0], config("full", rows=rows)):
            assert difference(generated(pair[0], *prompt()), want) < 1e-5


def test_absorbed_keys_under_a_policy():
    """Stored keys are the first channels; the others are zero in queries and keys."""
    found = []
    for mode in ("absorb", "rebuild"):
        model = tiny_model("llama", num_hidden_layers=2)
        model.model.rotary_emb.inv_freq.zero_()
        lorc.compress(model, lorc.LorcConfig(rank_k=32, rank_v=32, key_mode=mode))
        cfg = uncomp.UncompConfig(policy="snapkv", budget=BUDGET)
        with uncomp.patch(model, cfg) as handle:
            found.append(generated(model, *prompt()))
            assert handle.cache.layers[0].keys.shape[1] == 32
    assert difference(*found) < 1e-5


# ---- positions
def test_positions_that_the_model_makes_up_count_padding(pair):
    """Without position_ids padded columns have positions, so rows that are rotated again must start there."""
    ids, mask = prompt()
    new = prompt(columns=5, seed=3)[0]

    def run(model, _):
        first = model(ids, attention_mask=mask, use_cache=True)
        steps = []
        for i in (1, 2):
            seen = torch.cat([mask, mask.new_ones(2, i)], 1)
            steps.append(model(new[:, i - 1 : i], attention_mask=seen, past_key_values=first.past_key_values).logits)
        seen = torch.cat([mask, mask.new_ones(2, 5)], 1)
        turn = model(new[:, 2:], attention_mask=seen, past_key_values=first.past_key_values).logits
        return torch.cat([*steps, turn], 1)

    got, want = both(pair, config("snapkv"), run)
    assert (got - want).abs().max() < 1e-5


def test_a_step_at_another_position_than_the_prompt_said_is_refused(pair):
    ids, mask = prompt()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with uncomp.patch(pair[0], config("snapkv")), torch.no_grad():
        cache = pair[0](ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
        seen = torch.cat([mask, mask.new_ones(2, 1)], 1)
        with pytest.raises(ValueError, match=r"^uncomp: position_ids must be given.*sequence 1 continues at 57.*at 70"):
            pair[0](ids[:, :1], attention_mask=seen, past_key_values=cache)


# ---- what is stored
def test_bytes_are_those_of_the_ranks_to_the_byte(pair):
    """(r_K + r_V) Hkv numbers a token and layer, in float32; ranks 48 + 32 and 16 + 48; rows of 40 tokens."""
    with uncomp.patch(pair[0], config("snapkv", window=8)) as handle:
        generated(pair[0], *prompt())
        stats = handle.stats()
    assert stats["cache_bytes"] == 4 * 2 * 4 * BUDGET * (48 + 32 + 16 + 48)
    assert stats["full_cache_bytes"] == 4 * 2 * 4 * 2 * 64 * (75 + 62)


def test_half_precision_stores_two_bytes_and_stays_near_the_dense_model():
    model, _, dense = compressed_and_dense("llama", num_hidden_layers=2)
    pair = (model.bfloat16(), None, dense.bfloat16())

    def run(model, handle):
        return model(prompt()[0], use_cache=True).logits, generated(model, *prompt()), handle.stats()["cache_bytes"]

    got, want = both(pair, config("snapkv"), run)
    assert (got[0] - want[0]).abs().max() < 0.1 * want[0].abs().max()
    assert 2 * got[2] == want[2] == 2 * 2 * 4 * BUDGET * 2 * 128


# ---- copies, beams, order of handles
def test_beams_and_forks(pair):
    ids, mask = prompt(batch=1, pad=0)
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    got, want = both(pair, config("full"), lambda m, _: m.generate(ids, attention_mask=mask, **options))
    assert torch.equal(got, want)

    def run(model, handle):
        cache = handle.new_cache()
        model(ids, past_key_values=cache)
        twin = cache.fork()
        model(ids[:, :7], past_key_values=twin)
        return [model(ids[:, :1], past_key_values=c).logits for c in (cache, twin)]

    got, want = both(pair, config("snapkv"), run)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, want, strict=True))


def test_compress_after_patch_is_patch_after_compress():
    found = []
    for first in ("patch", "lorc"):
        model, ids = tiny_model("llama", num_hidden_layers=2), prompt()
        stock = generated(model, *ids)
        if first == "patch":
            patched, low = uncomp.patch(model, config("snapkv")), lorc.compress(model)
        else:
            low, patched = lorc.compress(model), uncomp.patch(model, config("snapkv"))
        found.append(generated(model, *ids))
        for handle in (patched, low) if first == "lorc" else (low, patched):
            handle.remove()
        assert difference(generated(model, *ids), stock) == 0
    assert difference(*found) == 0


def test_the_loop_on_the_device_gives_the_same_tokens(pair):
    ids, mask = prompt()
    with uncomp.patch(pair[0], config("snapkv")) as handle:
        want = generated(pair[0], ids, mask).sequences
        assert torch.equal(handle.generate(ids, mask, max_new_tokens=6), want)


# ---- refusals
def test_a_cache_of_other_projections_is_refused():
    model, ids = tiny_model("llama", num_hidden_layers=1), prompt()[0]
    with uncomp.patch(model, config("snapkv")), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with lorc.compress(model), pytest.raises(ValueError, match=r"^uncomp: this cache was filled before"):
            model(ids[:, :1], past_key_values=cache)


def test_deleted_heads_are_refused(pair):
    cfg = uncomp.UncompConfig(delete_heads=1, budget=BUDGET)
    with uncomp.patch(pair[0], cfg), pytest.raises(NotImplementedError, match=r"^uncomp: delete_heads copies outputs"):
        pair[0](prompt()[0], use_cache=True)


# ---- prompts that run exactly
@pytest.mark.parametrize("mode", ["rebuild", "absorb"])
def test_an_exact_prompt_stores_what_the_factors_give_of_exact_states(mode):
    """The prompt's logits are the original's; stored rows are its keys and values times the bases; a step after it
    runs on the factors."""
    model = with_biases(tiny_model("qwen2", num_hidden_layers=2))
    if mode == "absorb":
        model.model.rotary_emb.inv_freq.zero_()
    ids, mask = prompt()
    stock, hooks = {}, []
    for i, layer in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):
            proj = getattr(layer.self_attn, name)
            hooks.append(proj.register_forward_hook(lambda m, a, out, k=(i, name): stock.__setitem__(k, out - m.bias)))
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[mask.bool()]
    for hook in hooks:
        hook.remove()
    known = dict(stock)
    with lorc.compress(model, lorc.LorcConfig(rho=0.5, key_mode=mode, exact_prefill=True)) as low:
        with uncomp.patch(model, config("full", decode="grow")), torch.no_grad():
            out = model(ids, attention_mask=mask, use_cache=True)
            assert (out.logits[mask.bool()] - want).abs().max() < 1e-6
            for i, layer in enumerate(model.model.layers):
                attention, rows = layer.self_attn, out.past_key_values.layers[i]
                for name, held in (("k_proj", rows.keys), ("v_proj", rows.values)):
                    made = getattr(attention, name)
                    exact = known[i, name][0].view(70, 4, 64)  # of the first sequence, which has no padding
                    narrow = made.down.double().view(4, made.rank, -1)
                    basis = narrow @ torch.linalg.pinv(made.exact.weight.double().view(4, 64, -1))
                    wanted = torch.einsum("thd,hrd->htr", exact.double(), basis)
                    first = held[: 4 * (70 + 512)].view(4, 70 + 512, -1)[:, :70]
                    assert (first - wanted).abs().max() < 1e-4
            seen = torch.cat([mask, mask.new_ones(2, 1)], 1)
            step = model(ids[:, :1], attention_mask=seen, past_key_values=out.past_key_values).logits
            assert step.isfinite().all()
        with pytest.raises(NotImplementedError, match=r"^uncomp\.lorc: exact_prefill needs the original weights"):
            low.save_pretrained("nowhere")


def test_an_exact_prompt_of_a_fused_projection():
    """What is stored is what the split modules give, the logits are those of the fused one."""
    model = tiny_model("phi3", num_hidden_layers=1)
    ids, mask = prompt()
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[mask.bool()]
    found = []
    for exact in (True, False):
        low = lorc.compress(model, lorc.LorcConfig(rho=0.5, exact_prefill=exact))
        with low, uncomp.patch(model, config("full", max_new_tokens=1)), torch.no_grad():
            out = model(ids, attention_mask=mask, use_cache=True)
            rows = out.past_key_values.layers[0]
            found.append((out.logits[mask.bool()], rows.keys, rows.values))
    assert (found[0][0] - want).abs().max() < 1e-5 < (found[1][0] - want).abs().max()
    for one, other in zip(found[0][1:], found[1][1:], strict=True):  # one layer: equal inputs
        first = [held[: 4 * 71].view(4, 71, -1)[:, :70] for held in (one, other)]  # live slots of the first sequence
        assert (first[0] - first[1]).abs().max() < 1e-6
