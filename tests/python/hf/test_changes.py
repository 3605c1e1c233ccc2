# SPDX-License-Identifier: Apache-2.0
"""What changes around a recorded step, in the model and in the process, is seen or leaves it alone."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch

pytest.importorskip("transformers")
from graph_support import NEW, patched, prompt, run

import uncomp
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf


@pytest.fixture
def model(device):
    return tiny_model("llama", tie_word_embeddings=False).to(device)


def loop(handle, device):
    return handle.generate(prompt(device), max_new_tokens=NEW)


# ---- between two requests
def weight(model):
    model.lm_head.weight.data = -model.lm_head.weight.data


def head_hook(model):
    model.lm_head.register_forward_hook(lambda module, args, output: -output)


def stack_hook(model):
    def negate(module, args, output):
        output.last_hidden_state = -output.last_hidden_state
        return output

    model.model.register_forward_hook(negate)


def wrapped(model):
    before = model.forward

    def forward(*args, **kwargs):
        out = before(*args, **kwargs)
        out.logits = -out.logits
        return out

    model.forward = forward


def scale(model):
    model.model.layers[1].self_attn.scaling *= 4


@pytest.mark.parametrize("change", [weight, head_hook, stack_hook, wrapped, scale])
def test_the_next_request_sees_it(model, device, change):
    with patched(model) as handle:
        loop(handle, device)
        run(model, prompt(device))
        change(model)
        got, stock = loop(handle, device), run(model, prompt(device))
    with patched(model, record=False):
        want = run(model, prompt(device))
    assert torch.equal(got, want)
    assert torch.equal(stock, want)


class Adapter(torch.nn.Module):
    """A linear layer with something that can be switched on."""

    def __init__(self, base) -> None:
        super().__init__()
        self.base, self.on = base, True

    def forward(self, states):
        out = self.base(states)
        return out * -3 if self.on else out


def test_a_switch_in_python_is_seen(model, device):
    adapter = model.model.layers[1].mlp.up_proj = Adapter(model.model.layers[1].mlp.up_proj)
    with patched(model) as handle:
        run(model, prompt(device))
        adapter.on = False
        got = run(model, prompt(device))
        assert handle.stats()["steps_recorded"] == 2
    with patched(model, record=False):
        assert torch.equal(got, run(model, prompt(device)))


def test_hooks_on_all_modules_are_not_skipped(model, device):
    calls = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *a: calls.append(1))
    try:
        with patched(model) as handle:
            run(model, prompt(device))
            assert handle.stats()["eager_reason"] == "a replay would skip the hook on all modules"
    finally:
        hook.remove()
    assert len(calls) > 20 * NEW


# ---- within one turn
def steps(model, device, middle):
    """Tokens of 12 steps, with something done before the sixth."""
    with torch.no_grad():
        out = model(prompt(device), use_cache=True)
        tokens = [out.logits[:, -1:].argmax(-1)]
        for step in range(12):
            if step == 5:
                middle()
            tokens.append(model(tokens[-1], past_key_values=out.past_key_values).logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)


def test_a_model_that_moves_between_two_steps(device):
    found = []
    for record in (True, False):
        model = tiny_model("llama").to(device)
        embedding = model.model.embed_tokens.weight

        def move(embedding=embedding):
            embedding.data = embedding.data.flip(0).clone()

        with patched(model, record=record):
            found.append(steps(model, device, move))
    assert torch.equal(*found)


def test_training_mode_between_two_steps_is_refused(model, device):
    with patched(model), pytest.raises(NotImplementedError, match=r"call model.eval\(\)"):
        steps(model, device, model.train)


@pytest.mark.parametrize("record", [True, False])
def test_steps_in_different_modes(model, device, record):
    with patched(model, record=record), torch.no_grad():
        out = model(prompt(device), use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
            with mode():
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1).clone()


# ---- many caches, failures
def test_more_caches_in_turn_than_recordings_are_kept(model, device):
    with patched(model) as handle, torch.no_grad():
        outs = [model(prompt(device, seed=s), use_cache=True) for s in range(10)]
        tokens = [out.logits[:, -1:].argmax(-1) for out in outs]
        for _ in range(6):
            for i, out in enumerate(outs):
                tokens[i] = model(tokens[i], past_key_values=out.past_key_values).logits[:, -1:].argmax(-1)
        stats = handle.stats()
        assert stats["steps_recorded"] == 8
        assert stats["eager_reason"] == "more than 8 caches are in use in turns"
        assert stats["steps_replayed"] > 30


def test_both_kinds_of_generate_keep_their_recordings(model, device):
    with patched(model) as handle:
        for _ in range(3):
            run(model, prompt(device))
            loop(handle, device)
        assert handle.stats()["steps_recorded"] == 2


def test_release_tries_again_what_failed(model, device):
    with patched(model) as handle:
        real = handle._recordings.machine.record
        handle._recordings.machine.record = lambda *a: (_ for _ in ()).throw(RuntimeError("not today"))
        run(model, prompt(device))
        handle._recordings.machine.record = real
        run(model, prompt(device))
        assert handle.stats()["steps_recorded"] == 0
        handle.release()
        run(model, prompt(device))
        assert handle.stats()["steps_recorded"] == 1


def test_a_lack_of_memory_is_not_remembered(model, device):
    with patched(model) as handle:
        real = handle._recordings.machine.record
        handle._recordings.machine.record = lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
        run(model, prompt(device), max_new_tokens=4)
        handle._recordings.machine.record = real
        run(model, prompt(device))
        assert handle.stats()["steps_recorded"] == 1


def test_a_reorder_that_fails_half_way_breaks_the_cache(model, device):
    with patched(model), torch.no_grad():
        cache = model(prompt(device, 2), use_cache=True).past_key_values
        ragged = cache.uncomp.layers[1].ragged
        ragged.slots = [ragged.slots[0] + 1, ragged.slots[1] - 1]  # as a plan over the whole model may give them
        with pytest.raises(ValueError, match="cannot change places"):
            cache.reorder_cache(torch.tensor([1, 0], device=device))
        with pytest.raises(RuntimeError, match="start with a new cache"):
            model(prompt(device, 2, 1), past_key_values=cache)


# ---- the process
def test_another_default_device(model, device):
    with patched(model) as handle:
        want = run(model, prompt(device)), loop(handle, device)
        ids = prompt(device)
        with torch.device("meta"):
            got = handle.generate(ids, max_new_tokens=NEW)
    assert torch.equal(got, want[1])


def test_threads_take_turns(model, device):
    with patched(model) as handle:
        want = [run(model, prompt(device, seed=s)) for s in range(4)]
        found = {}

        def work(seed):
            for _ in range(2):
                found[seed] = (
                    run(model, prompt(device, seed=seed)),
                    handle.generate(prompt(device, seed=seed), max_new_tokens=NEW),
                )

        threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in range(4):
        assert torch.equal(found[seed][0], want[seed])
        assert torch.equal(found[seed][1], want[seed])


def test_a_patched_model_is_not_copied(model, device):
    with patched(model), pytest.raises(TypeError, match="remove the patch before the model is copied"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_caches_without_a_patch_and_forks_are_freed_at_once(model, device):
    gc.collect()
    gc.disable()
    try:
        config = uncomp.UncompConfig(budget=48)
        model.set_attn_implementation("uncomp")
        for _ in range(3):
            run(model, prompt(device), past_key_values=uncomp.UncompCache(model, config))
        cache = uncomp.UncompCache(model, config)
        run(model, prompt(device), past_key_values=cache)
        for _ in range(3):
            cache.fork()
        alive = [o for o in gc.get_objects() if type(o).__name__ == "RaggedLayer"]
        assert len(alive) == model.config.num_hidden_layers
    finally:
        gc.enable()
        model.set_attn_implementation("sdpa")
