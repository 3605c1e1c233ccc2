# SPDX-License-Identifier: Apache-2.0
"""What comes behind a pruned prompt: decode steps, recorded ones too, later turns, beams, forks; none is pruned."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from graph_support import both, padded
from graph_support import run as generated
from hidden_support import slow, stored

import uncomp
from uncomp import PrefillPruning, UncompConfig
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf
LAYERS, TOKENS, NEW = 6, 120, 7
STAGES = {"stages": [0, 2, 3, 5], "n_min": 30}
REACHED = [120, 120, 90, 60, 60, 30]


@pytest.fixture
def model(models, device):
    if device not in models:
        models[device] = tiny_model("llama", num_hidden_layers=LAYERS).to(device)
    return models[device]


def prompt(device: str, batch: int = 1, columns: int = TOKENS, seed: int = 1):
    return torch.randint(3, 199, (batch, columns), generator=torch.Generator().manual_seed(seed)).to(device)


def config(**options) -> UncompConfig:
    return UncompConfig(**{"policy": "full", "prefill": PrefillPruning(**STAGES), **options})


@torch.no_grad()
def story(model, ids, pieces: list[int], **kwargs) -> torch.Tensor:
    """Logits of the last token of every piece, fed one behind the other."""
    cache, out, begin = None, [], 0
    for count in pieces:
        state = model(ids[:, begin : begin + count], past_key_values=cache, use_cache=True, logits_to_keep=1, **kwargs)
        cache, begin = state.past_key_values, begin + count
        out.append(state.logits[:, -1])
    return torch.stack(out, 1)


# ---- values
@pytest.mark.parametrize(
    "pieces", [[TOKENS] + [1] * NEW, [TOKENS, NEW], [TOKENS, 1, NEW - 1], [TOKENS, 4, 1, 2]], ids=str
)
def test_what_follows_attends_to_the_survivors_of_each_layer(model, device, pieces):
    """One token or several, against the literal computation in which only the prompt was shortened."""
    ids = prompt(device, columns=TOKENS + NEW)
    want, _ = slow(model, ids, REACHED, new=NEW)
    with uncomp.patch(model, config()):
        got = story(model, ids, pieces)[0]
    ends = torch.tensor(pieces).cumsum(0) - TOKENS
    torch.testing.assert_close(got, want[ends], atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"policy": "uncomp", "budget": 200}, {"policy": "snapkv", "budget": 24, "window": 8}], ids=str
)
def test_positions_and_lengths_stay_logical(model, device, options):
    ids = prompt(device, columns=TOKENS + NEW)
    with uncomp.patch(model, config(**options)) as handle, torch.no_grad():
        cache = model(ids[:, :TOKENS], logits_to_keep=1).past_key_values
        assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [TOKENS] * LAYERS
        for token in range(TOKENS, TOKENS + NEW):
            model(ids[:, token : token + 1], past_key_values=cache)
        assert cache.get_seq_length() == TOKENS + NEW
        for layer in range(LAYERS):
            kept = sorted(stored(cache, layer))
            assert kept[-NEW:] == list(range(TOKENS, TOKENS + NEW))
            assert len(kept) == min(options.get("budget", 10**6), REACHED[layer] + NEW)
        assert handle.stats()["real_tokens"] == [TOKENS + NEW]


def test_a_second_turn_by_generate(model, device):
    """generate slices by the logical length; a stored length would feed old tokens again."""
    ids = prompt(device)
    with uncomp.patch(model, config()):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
        more = torch.cat([out.sequences, prompt(device, columns=6, seed=5)], 1)
        again = model.generate(
            more,
            attention_mask=torch.ones_like(more),
            past_key_values=out.past_key_values,
            max_new_tokens=1,
            do_sample=False,
        )
        assert [len(stored(out.past_key_values, layer)) for layer in range(LAYERS)] == [n + 11 for n in REACHED]
    want, _ = slow(model, more, REACHED, new=11)
    assert int(again[0, -1]) == int(want[-1].argmax())


def test_a_turn_longer_than_the_last_stage_is_not_pruned(model, device):
    ids = prompt(device, columns=TOKENS + 100)
    want, _ = slow(model, ids, REACHED, new=100)
    with uncomp.patch(model, config()) as handle, torch.no_grad():
        cache = model(ids[:, :TOKENS], logits_to_keep=1).past_key_values
        logits = model(ids[:, TOKENS:], past_key_values=cache).logits  # of all new tokens
        assert handle.stats()["reached_tokens"] == [[n] for n in REACHED]
    torch.testing.assert_close(logits[0], want[1:], atol=3e-5, rtol=0)


def test_a_cache_that_was_reset_prunes_again(model, device):
    ids = prompt(device)
    with uncomp.patch(model, config()) as handle, torch.no_grad():
        cache = handle.new_cache()
        first = model(ids, past_key_values=cache, logits_to_keep=1).logits
        cache.reset()
        again = model(ids, past_key_values=cache, logits_to_keep=1).logits
        assert torch.equal(first, again)
        assert handle.stats()["reached_tokens"] == [[n] for n in REACHED]


def test_forks_go_their_own_ways(model, device):
    ids = prompt(device, columns=TOKENS + 3)
    with uncomp.patch(model, config()) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids[:, :TOKENS], past_key_values=cache, logits_to_keep=1)
        twin = cache.fork()
        one = model(ids[:, TOKENS:], past_key_values=cache).logits
        model(prompt(device, columns=2, seed=9), past_key_values=twin)
        assert twin.get_seq_length() == TOKENS + 2
        fresh = story(model, ids, [TOKENS, 3])
    torch.testing.assert_close(one[:, -1], fresh[:, -1], atol=1e-6, rtol=0)


# ---- generate
def test_beams_of_a_batch_are_those_of_each_prompt(model, device):
    ids = prompt(device, 2)
    with uncomp.patch(model, config(policy="uncomp", budget=40)):
        together = generated(model, ids, num_beams=3)
        for row in range(2):
            assert torch.equal(generated(model, ids[row : row + 1], num_beams=3)[0], together[row])


def test_several_sequences_and_sampling(model, device):
    with uncomp.patch(model, config(policy="uncomp", budget=40)):
        torch.manual_seed(3)
        out = generated(model, prompt(device), do_sample=True, num_return_sequences=3, top_k=30)
    assert out.shape[0] == 3 and len({tuple(row) for row in out.tolist()}) > 1


def test_the_loop_on_the_device_gives_the_tokens_of_generate(model, device):
    ids, mask = padded(device, TOKENS)
    with uncomp.patch(model, config(policy="uncomp", budget=40)) as handle:
        assert torch.equal(handle.generate(ids, mask, max_new_tokens=14), generated(model, ids, mask))
        assert handle.stats()["reached_tokens"][-1] == [30, 30, 30]


@pytest.mark.parametrize(
    "options", [{}, {"policy": "snapkv"}, {"decode": "grow", "max_new_tokens": 64}, {"policy": "full"}], ids=str
)
def test_recorded_steps_are_the_ordinary_ones(model, device, options):
    """The layers of one cache differ in length; a second request of the same shape uses the first one's recording."""
    ids, mask = padded(device, TOKENS)

    def call(handle):
        return torch.cat([generated(model, ids, mask), generated(model, ids.flip(0), mask.flip(0))])

    stats = both(model, call, prefill=PrefillPruning(**STAGES), **options)
    assert stats["steps_replayed"] >= 2 * 14 - 6
    ids = prompt(device, 2)
    stats = both(
        model,
        lambda h: torch.cat([generated(model, ids), generated(model, ids)]),
        prefill=PrefillPruning(**STAGES),
        **options,
    )
    assert stats["steps_recorded"] == 1
    assert stats["steps_replayed"] == 2 * 13 - 1
