# SPDX-License-Identifier: Apache-2.0
"""Recorded decode steps of models of low rank: the tokens of ordinary steps.

On the CPU a recording is a stand-in that calls the step again (graph_support).
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from graph_support import NEW, WAYS, both, padded, patched, prompt, run
from lorc_support import by_torch, with_biases

import uncomp
from uncomp import lorc
from uncomp.graph import Once
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf

POLICIES = {**WAYS, "pruned": {"prefill": {"stages": [0, 1], "n_min": 24}}}


def low_rank(family: str = "qwen2", device: str = "cpu", **fields):
    """A compressed model whose ranks differ by layer and side."""
    model = with_biases(tiny_model(family, num_hidden_layers=2)).to(device)
    lorc.compress(model, lorc.LorcConfig(**{"rank_k": (48, 16), "rank_v": (32, 48), **fields}))
    return model


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def small(made, device):
    if device not in made:
        made[device] = low_rank(device=device)
    return made[device]


@pytest.fixture
def by_hand(made, device):
    """One whose keys torch makes."""
    if (device, "torch") not in made:
        made[device, "torch"] = by_torch(low_rank(device=device))
    return made[device, "torch"]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("road", ["kernel", "torch"])
def test_every_step_but_the_first_is_a_replay(small, by_hand, device, name, road):
    small = small if road == "kernel" else by_hand
    stats = both(small, lambda h: run(small, prompt(device)), **POLICIES[name])
    weighs = name in ("h2o", "tova")
    told = "a test says so" if road == "torch" else "the policy weighs every stored token at each step"
    assert stats["key_road"] == ("kernel" if road == "kernel" and not weighs else f"torch: {told}")
    assert stats["steps_recorded"] == 1, stats["eager_reason"]
    assert (stats["steps_replayed"], stats["steps_eager"]) == (NEW - 2, 1)


@pytest.mark.parametrize("name", ["uncomp", "grows"])
def test_padded_batch(small, device, name):
    ids, mask = padded(device)
    assert both(small, lambda h: run(small, ids, mask), **POLICIES[name])["steps_replayed"] == NEW - 2


@pytest.mark.parametrize("decode", ["evict", "grow"])
def test_64_tokens(small, device, decode):
    options = {"decode": decode, "max_new_tokens": 80, "policy": "snapkv"}
    stats = both(small, lambda h: run(small, prompt(device), max_new_tokens=64), **options)
    assert (stats["steps_recorded"], stats["steps_replayed"]) == (1, 62)


def test_absorbed_keys_are_recorded(device):
    model = tiny_model("llama", num_hidden_layers=2).to(device)
    model.model.rotary_emb.inv_freq.zero_()
    lorc.compress(model, lorc.LorcConfig(rho=0.5, key_mode="absorb"))
    assert both(model, lambda h: run(model, prompt(device)))["steps_replayed"] == NEW - 2


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_normalised_and_fused_keys_are_recorded(device, family):
    model = low_rank(family, device)
    assert both(model, lambda h: run(model, prompt(device)))["steps_replayed"] == NEW - 2


def test_weights_that_are_written_to_reach_recorded_steps(device):
    """What kernels read of a norm is a copy in float32: a request after a change must see the change."""
    found = []
    for change in ("between", "before"):
        model = low_rank("qwen3", device)
        with patched(model) as handle:
            if change == "between":
                run(model, prompt(device))
            with torch.no_grad():
                model.model.layers[0].self_attn.k_norm.weight.mul_(-1.5)
            found.append(run(model, prompt(device)))
            assert handle.stats()["steps_recorded"] == 1
    assert torch.equal(*found)


def test_rows_that_grow_are_recorded_again(small, device):
    stats = both(
        small, lambda h: run(small, prompt(device), max_new_tokens=40), decode="grow", max_new_tokens=4, budget=40
    )
    assert (stats["steps_recorded"], stats["steps_replayed"]) == (3, 38)


@pytest.mark.parametrize("name", ["uncomp", "grows", "h2o", "adakv"])
@pytest.mark.parametrize("road", ["kernel", "torch"])
def test_the_next_request_has_the_tokens_of_its_own(small, by_hand, device, name, road):
    """Rows of another prompt have other rooms: a recording made for shorter ones must not be replayed on them."""
    small = small if road == "kernel" else by_hand
    with patched(small, record=False, **POLICIES[name]):
        want = [run(small, prompt(device, seed=s, columns=90 + s)) for s in range(4)]
    with patched(small, **POLICIES[name]) as handle:
        for s in range(4):
            assert torch.equal(run(small, prompt(device, seed=s, columns=90 + s)), want[s])
        assert handle.stats()["steps_eager"] == 1


def test_rows_that_are_longer_than_a_recording_knows_do_not_fit():
    """Steps that make keys of all slots look at as many columns as the longest row had when they were recorded."""
    small, layers = by_torch(low_rank()), []
    with patched(small, policy="adakv", record=False) as handle, torch.no_grad():
        for seed in range(8):
            cache = handle.new_cache()
            small(prompt("cpu", seed=seed), past_key_values=cache)
            layers.append(cache.uncomp.layers[0].ragged)
    short, long = (choose(layers, key=lambda layer: layer.widest) for choose in (min, max))
    assert short.widest < long.widest and short.capacity == long.capacity
    assert long.fits(short) and not short.fits(long)
    width = long.widest
    long.copy_(short)
    assert long.widest == width and torch.equal(long.row_start, short.row_start)


def test_later_turns_and_beams(small, device):
    def call(handle):
        with torch.no_grad():
            cache = handle.new_cache()
            first = run(small, prompt(device), past_key_values=cache)
            longer = torch.cat([first, prompt(device, columns=7, seed=3)], 1)
            second = run(small, longer, past_key_values=cache)
            return torch.cat([second, run(small, prompt(device, seed=4), num_beams=2, max_new_tokens=60)], 1)

    for name in ("uncomp", "grows"):
        assert both(small, call, **POLICIES[name])["steps_replayed"] > 2 * NEW


def test_positions_that_a_later_turn_shifts(small, device):
    """Without position_ids padding counts, so rows are rotated as far ahead as each sequence was padded."""
    ids, mask = padded(device)

    def call(handle):
        with torch.no_grad():
            out = small(ids, attention_mask=mask, use_cache=True)
            cache, tokens = out.past_key_values, [out.logits[:, -1:].argmax(-1)]
            for turn in (6, 6):
                for _ in range(turn):
                    seen = torch.cat([mask, mask.new_ones(len(ids), cache.get_seq_length() + 1 - mask.shape[1])], 1)
                    tokens.append(
                        small(tokens[-1], attention_mask=seen, past_key_values=cache).logits[:, -1:].argmax(-1)
                    )
                new = prompt(device, len(ids), 5, seed=turn)
                seen = torch.cat([mask, mask.new_ones(len(ids), cache.get_seq_length() + 5 - mask.shape[1])], 1)
                out = small(new, attention_mask=seen, past_key_values=cache)
                tokens.append(out.logits[:, -1:].argmax(-1))
        return torch.cat(tokens, 1)

    for name in ("uncomp", "grows"):
        both(small, call, **POLICIES[name])


def test_the_loop_on_the_device(small, device):
    ids, mask = padded(device)
    with patched(small) as handle:
        want = run(small, ids, mask)
        assert torch.equal(handle.generate(ids, mask, max_new_tokens=NEW), want)
        assert handle.stats()["steps_replayed"] > NEW


# ---- a real model
@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["evict", "grow"])
def test_64_tokens_of_a_real_model(decode):
    """Replays are the ordinary steps; keys that kernels make lead to the logits that keys of torch lead to."""
    from uncomp.hf.load import load_model

    try:
        model, _ = load_model("smollm2-135m", dtype="bfloat16", device="cuda")
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))
    model.generation_config.eos_token_id = None
    lorc.compress(model, lorc.LorcConfig(rho=0.85))
    ids, options = prompt("cuda", columns=700), {"budget": 256, "decode": decode, "max_new_tokens": 80}
    stats = both(model, lambda h: run(model, ids, max_new_tokens=64), **options)
    assert (stats["steps_recorded"], stats["steps_replayed"], stats["key_road"]) == (1, 62, "kernel")
    made = []
    for road in ("kernel", "torch"):
        model = by_torch(model) if road == "torch" else model
        for layer in model.model.layers if road == "torch" else ():
            layer.self_attn.k_proj.codec._stamp = ()  # numbers are read again
        with patched(model, record=False, **options) as handle, torch.no_grad():
            cache = handle.new_cache()
            model(ids, past_key_values=cache)
            made.append([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8)])
            assert handle.stats()["key_road"].startswith(road)
    for kernel, torch_made in zip(*made, strict=True):
        assert (kernel - torch_made).norm() < 0.06 * torch_made.norm()  # both in bfloat16


# ---- compiled steps
@pytest.mark.parametrize("name", ["uncomp", "grows", "streaming_llm"])
@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_a_compiled_step_is_one_graph(device, monkeypatch, name, family):
    """No break, and another request does not compile it again."""
    compiled, real = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, *, dynamic, options: real(f, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    model = low_rank(family, device)
    with patched(model, record=False, **POLICIES[name]):
        want = [run(model, prompt(device, seed=s, columns=90 + s)) for s in range(2)]
    with patched(model, compile="step", **POLICIES[name]) as handle:
        if device == "cpu":  # torch.compile does nothing under the stand-in's log
            handle._recordings.machine.record = lambda device, step: Once(step)
        for s in range(2):
            assert torch.equal(run(model, prompt(device, seed=s, columns=90 + s)), want[s])
    assert len(compiled) == 1


def test_compress_under_a_patch_that_joins_projections(device):
    """Compiled steps hold queries', keys' and values' weights in one matrix, which is no tie."""
    model = tiny_model("llama", num_hidden_layers=2).to(device)
    ids, stock = prompt(device), {name: weight.clone() for name, weight in model.state_dict().items()}
    with uncomp.patch(model, uncomp.UncompConfig(policy="full", compile="step")) as handle:
        with lorc.compress(model, lorc.LorcConfig(rho=0.5)) as low, torch.no_grad():
            got = model(ids, past_key_values=handle.new_cache()).logits
        with torch.no_grad():
            again = model(ids, past_key_values=handle.new_cache()).logits
        assert low.ranks.key
    assert all(torch.equal(weight, stock[name]) for name, weight in model.state_dict().items())
    with torch.no_grad():
        assert (again - model(ids).logits).abs().max() < 1e-4
        lorc.compress(model, lorc.LorcConfig(rho=0.5))
        assert (got - model(ids).logits).abs().max() < 1e-4
