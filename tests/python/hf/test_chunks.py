# SPDX-License-Identifier: Apache-2.0
"""MLPs in chunks of tokens: the same values, less memory, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import uncomp
from uncomp.hf import chunks
from uncomp.testing import tiny_model, tiny_model_types

pytestmark = pytest.mark.hf


def watch(linear) -> list[int]:
    """Token counts that reach a linear layer, without a hook: one would keep chunks away."""
    seen, before = [], linear.forward

    def forward(states):
        seen.append(states.shape[1])
        return before(states)

    linear.forward = forward
    return seen


@pytest.mark.parametrize("kind", tiny_model_types())
def test_values_are_those_of_one_piece(kind, device, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 24)
    model = tiny_model(kind).to(device)
    ids = torch.randint(3, 199, (2, 70), generator=torch.Generator().manual_seed(1)).to(device)
    mlp = model.get_decoder().layers[1].mlp
    seen = watch(mlp.down_proj)
    config = uncomp.UncompConfig(policy="full", skip_sliding=True)
    with torch.no_grad():
        want = model(ids).logits
        with uncomp.patch(model, config):
            got = model(ids).logits
    assert seen == [70, 12, 12, 12, 12, 12, 10]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert "forward" not in vars(mlp)


def test_gradients_and_short_prompts_go_in_one_piece(device, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 24)
    model = tiny_model("llama").to(device)
    seen = watch(model.model.layers[0].mlp.down_proj)
    ids = torch.randint(3, 199, (1, 70)).to(device)
    with uncomp.patch(model, uncomp.UncompConfig(budget=40)):
        model(ids, use_cache=False)
        with torch.no_grad():
            model(ids[:, :24], use_cache=False)
    assert seen == [70, 24]


def test_a_hook_inside_sees_the_prompt_and_keywords_pass(device, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 24)
    model, seen = tiny_model("llama").to(device), []
    mlp = model.model.layers[0].mlp
    mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with uncomp.patch(model, uncomp.UncompConfig(budget=40)), torch.no_grad():
        model(torch.randint(3, 199, (1, 70)).to(device), use_cache=False)
        states = torch.randn(1, 70, 64, device=device)
        torch.testing.assert_close(mlp(x=states), mlp(states))
    assert seen == [70, 70, 70]


def test_a_forward_that_somebody_wrapped_later_stays(device):
    model = tiny_model("llama").to(device)
    mlp = model.model.layers[0].mlp
    handle = uncomp.patch(model, uncomp.UncompConfig(budget=40))
    ours = mlp.forward
    mlp.forward = lambda states: ours(states) * 2
    wrapped = mlp.forward
    handle.remove()
    assert mlp.forward is wrapped
    states = torch.randn(1, 3, 64, device=device)
    torch.testing.assert_close(mlp.forward(states), 2 * type(mlp).forward(mlp, states))


@pytest.mark.gpu
def test_peak_of_an_mlp_is_that_of_a_chunk():
    model = tiny_model("llama", hidden_size=512, intermediate_size=4096).cuda()
    mlp = model.model.layers[0].mlp
    states = torch.randn(1, 8 * chunks.CHUNK, 512, device="cuda")

    def peak():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            mlp(states)
        return torch.cuda.max_memory_allocated() - before

    whole = peak()
    with uncomp.patch(model, uncomp.UncompConfig(budget=40)):
        assert peak() < whole / 4
