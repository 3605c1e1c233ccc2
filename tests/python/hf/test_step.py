# SPDX-License-Identifier: Apache-2.0
"""Recorded decode steps: the tokens of ordinary steps, for every way a cache can change between two of them.

On the CPU a recording is a stand-in that calls the step again; what is tested there is everything but the capture.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from graph_support import NEW, WAYS, both, padded, patched, prompt, run

import uncomp
from uncomp.graph import Once
from uncomp.testing import tiny_model, tiny_model_types

pytestmark = pytest.mark.hf


POLICIES = {
    **WAYS,
    "deleted": {"delete_heads": 1, "groups": 1},
    "deleted_grows": {"delete_heads": 2, "groups": 1, "rows": "query_head", "decode": "grow", "max_new_tokens": 64},
    "snapkv": {"policy": "snapkv"},
    "pruned": {"prefill": {"stages": [0, 2, 3], "n_min": 24}},
}


# ---- values
@pytest.mark.parametrize("name", POLICIES)
def test_every_step_but_the_first_is_a_replay(model, device, name):
    stats = both(model, lambda h: run(model, prompt(device)), **{**POLICIES[name]})
    assert stats["steps_recorded"] == 1
    assert (stats["steps_replayed"], stats["steps_eager"]) == (NEW - 2, 1)


@pytest.mark.parametrize("name", ["uncomp", "grows", "deleted", "pruned"])
def test_padded_batch(model, device, name):
    ids, mask = padded(device)
    stats = both(model, lambda h: run(model, ids, mask), **POLICIES[name])
    assert stats["steps_replayed"] == NEW - 2


@pytest.mark.parametrize("kind", tiny_model_types())
def test_every_family(device, kind):
    family = tiny_model(kind).to(device)
    stats = both(family, lambda h: run(family, prompt(device)), skip_sliding=True)
    assert stats["steps_replayed"] == (0 if stats["other_layers"] else NEW - 2), stats["eager_reason"]


def test_sampling_beams_and_embeddings(model, device):
    ids = prompt(device)

    def sampled(handle):
        torch.manual_seed(7)
        return run(model, ids, do_sample=True, temperature=0.8, top_k=20)

    assert both(model, sampled)["steps_replayed"] == NEW - 2
    assert both(model, lambda h: run(model, ids, num_beams=3))["steps_replayed"] == NEW - 2
    embeds = model.get_input_embeddings()(ids).detach()
    assert both(model, lambda h: model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False))[
        "steps_replayed"
    ]


def test_direct_calls_without_positions(model, device):
    def call(handle):
        with torch.no_grad():
            out = model(prompt(device), use_cache=True)
            cache, tokens = out.past_key_values, [out.logits[:, -1:].argmax(-1)]
            for _ in range(NEW):
                tokens.append(model(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
        return torch.cat(tokens, 1)

    assert both(model, call)["steps_replayed"] == NEW - 1


# ---- what changes between two steps
def test_rows_that_grow_are_recorded_again(model, device):
    stats = both(
        model, lambda h: run(model, prompt(device), max_new_tokens=40), decode="grow", max_new_tokens=4, budget=40
    )
    assert stats["steps_recorded"] == 3  # 4 free slots, then half of the rows' room more
    assert stats["steps_replayed"] == 38


@pytest.mark.parametrize("name", ["uncomp", "deleted", "pruned"])
def test_the_next_request_is_packed_into_the_same_memory(model, device, name):
    with patched(model, record=False, **POLICIES[name]) as handle:
        want = [run(model, prompt(device, seed=s, columns=90 + s)) for s in range(3)]
    with patched(model, **POLICIES[name]) as handle:
        for s in range(3):
            assert torch.equal(run(model, prompt(device, seed=s, columns=90 + s)), want[s])
        stats = handle.stats()
    assert (stats["steps_recorded"], stats["steps_eager"]) == (1, 1)


def test_another_batch_size_is_recorded_anew(model, device):
    ids, mask = padded(device)

    def call(handle):
        return torch.cat([run(model, ids, mask), run(model, ids[:1]), run(model, ids, mask)])

    assert both(model, call)["steps_recorded"] == 3


def test_two_caches_in_turn(model, device):
    def call(handle):
        one, two = prompt(device, seed=1), prompt(device, seed=2)
        caches, tokens = [], []
        with torch.no_grad():
            for ids in (one, two):
                out = model(ids, use_cache=True)
                caches.append(out.past_key_values)
                tokens.append([out.logits[:, -1:].argmax(-1)])
            for _ in range(NEW):
                for cache, seen in zip(caches, tokens, strict=True):
                    seen.append(model(seen[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
        return torch.cat([t for seen in tokens for t in seen], 1)

    stats = both(model, call)
    assert (stats["steps_recorded"], stats["steps_replayed"]) == (2, 2 * NEW - 1)


@pytest.mark.parametrize("name", ["uncomp", "grows", "deleted", "pruned"])
def test_a_second_turn_goes_on_with_the_recording(model, device, name):
    def call(handle):
        first = run(model, prompt(device), return_dict_in_generate=True)
        ids = torch.cat([first.sequences, prompt(device, columns=20, seed=5)], 1)
        return run(model, ids, past_key_values=first.past_key_values)

    stats = both(model, call, **POLICIES[name])
    assert stats["steps_eager"] == 1
    assert stats["steps_recorded"] == 1


def test_crop_after_replays(model, device):
    def call(handle):
        first = run(model, prompt(device), return_dict_in_generate=True)
        cache = first.past_key_values
        cache.crop(-5)
        ids = torch.cat([first.sequences[:, :-6], prompt(device, columns=20, seed=5)], 1)
        return run(model, ids, past_key_values=cache)

    both(model, call, decode="grow", max_new_tokens=64)


def test_a_fork_goes_its_own_way(model, device):
    def call(handle):
        cache = handle.new_cache()
        first = run(model, prompt(device), past_key_values=cache)
        twin = cache.fork()
        more = [torch.cat([first, prompt(device, columns=20, seed=s)], 1) for s in (5, 6)]
        return torch.cat([run(model, more[0], past_key_values=cache), run(model, more[1], past_key_values=twin)])

    both(model, call)
    both(model, call, decode="grow", max_new_tokens=64)


def test_moved_weights_are_noticed(model, device):
    with patched(model) as handle:
        first = run(model, prompt(device))
        weight = model.model.layers[1].mlp.up_proj.weight
        before = weight.data
        weight.data = before * -20
        try:
            changed = run(model, prompt(device))
        finally:
            weight.data = before
        assert handle.stats()["steps_recorded"] == 2
        assert not torch.equal(first, changed)
        assert torch.equal(run(model, prompt(device)), first)


def test_a_request_after_a_failed_one(model, device):
    with patched(model, record=False) as handle:
        want = run(model, prompt(device))
    with patched(model) as handle:
        run(model, prompt(device))
        hook = model.model.layers[2].register_forward_pre_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, prompt(device))
        hook.remove()
        assert torch.equal(run(model, prompt(device)), want)
        assert handle.stats()["steps_replayed"] == 2 * (NEW - 2) + 1  # the hook made the second request fail at once


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_in_turn(model, device, mode):
    def call(handle):
        first = run(model, prompt(device))
        with mode():
            second = run(model, prompt(device, seed=2))
        return torch.cat([first, second, run(model, prompt(device))])

    both(model, call)


def test_another_default_dtype(model, device):
    def call(handle):
        torch.set_default_dtype(torch.float64)
        try:
            return run(model, prompt(device))
        finally:
            torch.set_default_dtype(torch.float32)

    assert both(model, call)["steps_replayed"] == NEW - 2


EVERY = ["uncomp", "full", "snapkv", "adakv", "pyramidkv", "streaming_llm", "h2o", "tova", "random"]


@pytest.mark.parametrize("options", [{"policy": name, "budget": 40} for name in EVERY] + [{"budget": 1.0}], ids=str)
def test_every_policy_under_another_default_dtype(model, device, options):
    with uncomp.patch(model, uncomp.UncompConfig(**options)):
        want = run(model, prompt(device))
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert torch.equal(run(model, prompt(device)), want)
        finally:
            torch.set_default_dtype(torch.float32)


def test_stats_under_another_default_device(model, device):
    with uncomp.patch(model, uncomp.UncompConfig(budget=40)) as handle:
        run(model, prompt(device))
        want = handle.stats()
        torch.set_default_device("meta")
        try:
            assert handle.stats() == want
        finally:
            torch.set_default_device(None)


# ---- compiled steps
@pytest.mark.parametrize("name", ["uncomp", "deleted", "pruned"])
def test_a_compiled_step_is_one_graph_for_all_requests(model, device, monkeypatch, name):
    """No break, and nothing of a request in it that would compile it again: length, turn, cache object."""
    compiled, real = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def compile_(function, *, dynamic, options):
        return real(function, dynamic=dynamic, backend=backend, fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    ids, mask = padded(device)
    with patched(model, record=False, **POLICIES[name]) as handle:
        want = [run(model, prompt(device, seed=s, columns=90 + 7 * s)) for s in range(3)]
        batch = run(model, ids, mask)
    with patched(model, compile="step", **POLICIES[name]) as handle:
        if device == "cpu":  # torch.compile does nothing under the stand-in's log
            handle._recordings.machine.record = lambda device, step: Once(step)
        for s in range(3):
            assert torch.equal(run(model, prompt(device, seed=s, columns=90 + 7 * s)), want[s])
        assert len(compiled) == 1
        assert torch.equal(run(model, ids, mask), batch)
        assert torch.equal(handle.generate(ids, mask, max_new_tokens=NEW), batch)
        assert len(compiled) == 2
        first = run(model, prompt(device), return_dict_in_generate=True)
        more = torch.cat([first.sequences, prompt(device, columns=20, seed=5)], 1)
        run(model, more, past_key_values=first.past_key_values)
        assert len(compiled) == 2
