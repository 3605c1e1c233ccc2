# SPDX-License-Identifier: Apache-2.0
"""When a decode step is not recorded, what is said about it, and what recordings hold."""

from __future__ import annotations

import gc
import logging

import pytest

pytest.importorskip("transformers")
from graph_support import NEW, patched, prompt, run

from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf


# ---- reasons for ordinary steps
def reason_of(model, device, change=lambda handle: None, **options):
    with patched(model, **options) as handle:
        change(handle)
        run(model, prompt(device))
        stats = handle.stats()
    assert stats["steps_replayed"] == 0
    return stats["eager_reason"]


def test_the_reason_is_told_and_logged_once(model, device, caplog):
    def fail(handle):
        handle._recordings.machine.record = lambda *a: (_ for _ in ()).throw(RuntimeError("no graphs today\nmore"))

    with caplog.at_level(logging.WARNING, "uncomp"):
        text = reason_of(model, device, fail)
    assert text == "recording failed (RuntimeError: no graphs today)"
    assert [r.getMessage() for r in caplog.records] == [f"uncomp: decode steps run without a CUDA graph: {text}"]


def test_a_hook_inside_the_stack_is_not_skipped(model, device):
    calls = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *a: calls.append(1))
    try:
        text = reason_of(model, device)
    finally:
        hook.remove()
    assert text == "a replay would skip the hook on layers.1.mlp (LlamaMLP)"
    assert len(calls) == NEW


def test_a_hook_that_comes_later_is_not_skipped(model, device):
    with patched(model) as handle:
        run(model, prompt(device))
        calls = []
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *a: calls.append(1))
        run(model, prompt(device))
        hook.remove()
        assert len(calls) == NEW
        replayed = handle.stats()["steps_replayed"]
        run(model, prompt(device))
        assert handle.stats()["steps_replayed"] > replayed


def test_graph_off(model, device):
    with patched(model, record=False) as handle:
        run(model, prompt(device))
        stats = handle.stats()
    assert (stats["steps_replayed"], stats["eager_reason"]) == (0, 'the configuration says graph="off"')


def test_gradients_are_an_ordinary_step(model, device):
    with patched(model) as handle:
        out = model(prompt(device), use_cache=True)
        model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
        assert handle.stats()["eager_reason"] == "gradients are on; call under torch.no_grad()"


def test_outputs_that_a_replay_cannot_give(model, device):
    with patched(model) as handle:
        out = run(model, prompt(device), output_hidden_states=True, return_dict_in_generate=True)
        assert len(out.hidden_states) == NEW
        assert handle.stats()["eager_reason"] == "the forward was called with output_hidden_states"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_read_positions_on_the_host(device, kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 2048}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    other = tiny_model("llama", rope_parameters=rope).to(device)
    assert reason_of(other, device) == f"rotary embeddings of type {kind} read positions on the host"


# ---- memory
def test_remove_and_release_forget_all(model, device):
    with patched(model) as handle:
        run(model, prompt(device))
        assert len(handle._recordings.graphs) == 1
        stats = handle.stats()
        assert stats["waiting_bytes"] == stats["cache_bytes"] + stats["state_bytes"]
        handle.release()
        assert handle.stats()["waiting_bytes"] == 0
        assert not handle._recordings.graphs
        run(model, prompt(device))
    assert not handle._recordings.graphs
    assert "forward" not in vars(model.model)


def test_a_cache_that_is_dropped_is_freed_at_once(model, device):
    gc.collect()
    gc.disable()  # a cycle would keep it
    try:
        with patched(model, record=False) as handle:
            run(model, prompt(device))
            assert handle.cache is None
            alive = [o for o in gc.get_objects() if type(o).__name__ == "RaggedLayer"]
            assert alive == []
    finally:
        gc.enable()


def test_many_requests_keep_one_set_of_arenas(model, device):
    with patched(model) as handle:
        for seed in range(6):
            run(model, prompt(device, seed=seed), max_new_tokens=4)
        gc.collect()
        alive = [o for o in gc.get_objects() if type(o).__name__ == "RaggedLayer"]
        assert len(alive) == model.config.num_hidden_layers
        assert handle.stats()["steps_recorded"] == 1
