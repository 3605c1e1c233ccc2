# SPDX-License-Identifier: Apache-2.0
"""Recorded steps on a GPU: long runs, streams, devices, memory."""

from __future__ import annotations

import gc

import pytest
import torch

pytest.importorskip("transformers")
from graph_support import padded, patched, prompt, run

import uncomp
from uncomp.testing import tiny_model

pytestmark = [pytest.mark.hf, pytest.mark.gpu]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").cuda()


@pytest.fixture(scope="module")
def real():
    """SmolLM2-135M, where its package is installed."""
    from uncomp.hf.load import load_model

    try:
        model, _ = load_model("smollm2-135m", dtype="bfloat16", device="cuda")
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))
    model.generation_config.eos_token_id = None
    return model


def both(model, call, **options):
    """Tokens of recorded steps, those of ordinary ones, and the first one's stats."""
    with patched(model, record=False, **options):
        want = call()
    with patched(model, **options) as handle:
        got, stats = call(), handle.stats()
    return got, want, stats


@pytest.mark.parametrize("options", [{}, {"decode": "grow", "max_new_tokens": 100}], ids=["evict", "grow"])
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_512_tokens_of_a_real_model(real, options, batch):
    ids, mask = padded("cuda", 700) if batch == "padded" else (prompt("cuda", columns=700), None)
    got, want, stats = both(real, lambda: run(real, ids, mask, max_new_tokens=512), budget=256, groups=3, **options)
    assert torch.equal(got, want)
    assert stats["steps_replayed"] == 510


def test_512_tokens_in_the_loop(real):
    ids, mask = padded("cuda", 700)
    with patched(real, budget=256, groups=3) as handle:
        want = run(real, ids, mask, max_new_tokens=512)
        assert torch.equal(handle.generate(ids, mask, max_new_tokens=512), want)


def test_on_another_stream(model):
    side = torch.cuda.Stream()

    def call():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            first = run(model, prompt("cuda"))
        torch.cuda.current_stream().wait_stream(side)
        return torch.cat([first, run(model, prompt("cuda", seed=2)), run(model, prompt("cuda"))])

    got, want, stats = both(model, call)
    assert torch.equal(got, want)
    assert stats["steps_recorded"] == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_device():
    there = tiny_model("llama").to("cuda:1")
    got, want, stats = both(there, lambda: run(there, prompt("cuda:1")))
    assert torch.equal(got, want)
    assert stats["steps_recorded"] == 1
    with patched(there) as handle:
        assert torch.equal(handle.generate(prompt("cuda:1"), max_new_tokens=want.shape[1] - 90), want)


@pytest.mark.parametrize("options", [{}, {"decode": "grow", "max_new_tokens": 4}], ids=["evict", "grow"])
def test_many_requests_leak_nothing(model, options):
    with patched(model, **options) as handle:
        sizes = []
        for request in range(120):
            run(model, prompt("cuda", columns=60 + request % 40, seed=request), max_new_tokens=8)
            if request % 20 == 19:
                torch.cuda.synchronize()
                sizes.append((torch.cuda.memory_allocated(), handle.stats()["graph_bytes"]))
        assert len(set(sizes[1:])) == 1, sizes
    gc.collect()


def test_remove_gives_all_memory_back(model):
    sizes = []
    for _ in range(4):
        gc.collect()
        sizes.append(torch.cuda.memory_allocated())
        with patched(model):
            run(model, prompt("cuda"))
            assert torch.cuda.memory_allocated() > sizes[-1]
    # The first one may leave cuBLAS's workspace, which is for the next ones to use.
    assert len(set(sizes[1:])) == 1, sizes


def test_stats_name_every_byte(model):
    """What a request leaves allocated: keys, values, state, what recordings hold, up to the allocator's rounding."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with patched(model, budget=80) as handle:
        cache = handle.new_cache()
        ids = prompt("cuda", 2)
        run(model, ids, past_key_values=cache)
        held, stats = torch.cuda.memory_allocated() - before - ids.numel() * 8, handle.stats()
        tensors = sum(len(layer.ragged.tensors()) for layer in cache.uncomp.layers) + 8
    named = stats["cache_bytes"] + stats["state_bytes"]
    assert named <= held <= named + 512 * tensors + stats["graph_bytes"]


def test_a_failed_capture_leaves_an_ordinary_step(model):
    """A step that reads the device back cannot be recorded; the tokens are right all the same."""
    want = None
    with patched(model, record=False):
        want = run(model, prompt("cuda"))
    with patched(model) as handle:
        before = handle._step.forward

        def reads_back(**kwargs):
            out = before(**kwargs)
            float(out.last_hidden_state.sum())
            return out

        handle._step.forward = reads_back
        assert torch.equal(run(model, prompt("cuda")), want)
        assert handle.stats()["eager_reason"].startswith("recording failed")
        handle._step.forward = before
        assert torch.equal(run(model, prompt("cuda")), want)
    uncomp.raise_device_errors()
