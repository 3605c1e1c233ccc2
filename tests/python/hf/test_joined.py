# SPDX-License-Identifier: Apache-2.0
"""Joined projections: the same numbers, weights in one place only, and nothing left behind."""

import weakref

import pytest
import torch
from graph_support import ReplayMachine
from torch import nn

import uncomp
from uncomp.hf.joined import JoinedProjections
from uncomp.testing import tiny_model

KINDS = ("llama", "qwen2", "qwen3", "phi3")  # plain, with biases, with norms of heads, fused already


class Attention(nn.Module):
    def __init__(self, biases=(True, True, True)):
        super().__init__()
        self.q_proj = nn.Linear(32, 48, biases[0])
        self.k_proj = nn.Linear(32, 16, biases[1])
        self.v_proj = nn.Linear(32, 16, biases[2])

    def forward(self, states):
        return self.q_proj(states), self.k_proj(states), self.v_proj(states)


def storages(module):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.parameters()}


@torch.no_grad()
def test_a_step_is_one_product_and_a_prompt_is_not(device, monkeypatch):
    attention = Attention().to(device)
    step, prompt = torch.randn(3, 1, 32, device=device), torch.randn(3, 5, 32, device=device)
    want = attention(step), attention(prompt)
    joined, calls = JoinedProjections([attention]), []
    assert len(joined) == 1
    monkeypatch.setattr("uncomp.hf.joined.linear", lambda *a: calls.append(1) or nn.functional.linear(*a))
    for states, expected, products in ((step, want[0], 1), (prompt, want[1], 0)):
        calls.clear()
        with joined:
            torch.testing.assert_close(attention(states), expected)
        assert len(calls) == products
    calls.clear()
    assert all(torch.equal(a, b) for a, b in zip(attention(step), want[0], strict=True))  # outside: the modules' own
    assert not calls


@torch.no_grad()
def test_weights_lie_once_and_come_back(device):
    attention = Attention().to(device)
    before = {name: t.clone() for name, t in attention.state_dict().items()}
    size, names = sum(storages(attention).values()), set(vars(attention.q_proj))
    joined = JoinedProjections([attention])
    assert sum(storages(attention).values()) == size
    assert len(storages(attention)) == 2  # weights and biases
    assert all(torch.equal(t, before[name]) for name, t in attention.state_dict().items())
    joined.remove()
    assert len(storages(attention)) == 6
    assert sum(storages(attention).values()) == size
    assert all(torch.equal(t, before[name]) for name, t in attention.state_dict().items())
    assert set(vars(attention.q_proj)) == names


@torch.no_grad()
def test_other_weights_are_seen(device):
    attention = Attention().to(device)
    joined, states = JoinedProjections([attention]), torch.randn(2, 1, 32, device=device)
    attention.k_proj.weight.mul_(2)  # in place: through the view
    with joined:
        torch.testing.assert_close(attention(states)[1], nn.functional.linear(states, *attention.k_proj.parameters()))
    attention.k_proj.weight.data = torch.ones_like(attention.k_proj.weight)
    with joined:
        torch.testing.assert_close(attention(states)[1], nn.functional.linear(states, *attention.k_proj.parameters()))
    joined.remove()
    assert bool((attention.k_proj.weight == 1).all())


@torch.no_grad()
def test_another_order_and_another_input_give_what_the_modules_give():
    attention = Attention()
    joined, states, others = JoinedProjections([attention]), torch.randn(2, 1, 32), torch.randn(2, 1, 32)
    with joined:
        value = attention.v_proj(states)
        attention.q_proj(states)
        key = attention.k_proj(others)
        late = attention.v_proj(states)
    torch.testing.assert_close(value, nn.functional.linear(states, *attention.v_proj.parameters()))
    torch.testing.assert_close(key, nn.functional.linear(others, *attention.k_proj.parameters()))
    torch.testing.assert_close(late, value)


def test_what_is_not_plain_stays(device):
    def hooked():
        attention = Attention()
        attention.k_proj.register_forward_hook(lambda *a: None)
        return attention

    def wrapped():
        attention = Attention()
        attention.k_proj.forward = attention.k_proj.forward
        return attention

    class Other(nn.Linear):
        pass

    def special():
        attention = Attention()
        attention.v_proj = Other(32, 16)
        return attention

    kinds = [hooked(), wrapped(), special(), Attention((True, False, True)), Attention().to("meta"), nn.Module()]
    half = Attention()
    half.v_proj.half()
    for attention in (*kinds, half):
        assert len(JoinedProjections([attention])) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_model_gives_the_same_tokens_and_can_be_saved(kind, device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = tiny_model(kind).to(device)
    ids = torch.randint(3, 190, (2, 80), generator=torch.Generator().manual_seed(1)).to(device)

    def tokens():
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False)

    config = {"budget": 40, "skip_sliding": True}
    with uncomp.patch(model, uncomp.UncompConfig(**config)):
        want = tokens()
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    with uncomp.patch(model, uncomp.UncompConfig(**config, compile="step")) as handle:
        assert len(handle._joined) == (0 if kind == "phi3" else 2 * model.config.num_hidden_layers)
        if device == "cpu":
            ReplayMachine(handle)
        calls = []
        monkeypatch.setattr("uncomp.hf.joined.linear", lambda *a: calls.append(1) or nn.functional.linear(*a))
        assert torch.equal(tokens(), want)
        assert bool(calls) == (kind != "phi3")
        model.save_pretrained(tmp_path)
        joined = [weakref.ref(each.weight) for each in handle._joined._joined]
        assert handle._recordings.graphs
        separate = handle._joined.remove

        def remove():
            assert not handle._recordings.graphs  # they keep the joined weights
            separate()

        monkeypatch.setattr(handle._joined, "remove", remove)
    assert not any(weight() is not None for weight in joined)
    again = type(model).from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor.to(device), weights[name])
