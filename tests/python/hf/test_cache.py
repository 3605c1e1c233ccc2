# SPDX-License-Identifier: Apache-2.0
"""The cache as transformers and users handle it: beams, copies, crops, resets, later turns under eviction."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import uncomp
from uncomp.hf import compat
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def prompt(batch: int = 1, columns: int = 60, seed: int = 1):
    return torch.randint(3, 199, (batch, columns), generator=torch.Generator().manual_seed(seed))


def config(**options):
    return uncomp.UncompConfig(**{"policy": "snapkv", "budget": 24, "window": 8, **options})


def arenas(cache):
    """Live tokens of every layer and row, as a set of (position, key) that no slot order matters for."""
    found = []
    for layer in cache.uncomp.layers:
        ragged = layer.ragged
        for row in range(ragged.num_rows):
            start, length = int(ragged.row_start[row]), int(ragged.row_len[row])
            order = ragged.slot_position[start : start + length].argsort()
            found.append(
                (
                    ragged.slot_position[start : start + length][order],
                    ragged.key_rows[start : start + length][order],
                    ragged.value_rows[start : start + length][order],
                )
            )
    return found


def assert_same_cache(left, right, atol=1e-5):
    """Matrix products of another batch, or on another number of threads, differ in the last bits."""
    for a, b in zip(arenas(left), arenas(right), strict=True):
        assert torch.equal(a[0], b[0])
        for x, y in zip(a[1:], b[1:], strict=True):
            torch.testing.assert_close(x, y, atol=atol, rtol=0)


def steps(model, state, count, tokens=None):
    """Greedy steps, or the given tokens."""
    out = []
    for i in range(count):
        token = state.logits[:, -1:].argmax(-1) if tokens is None else tokens[:, i : i + 1]
        out.append(token)
        state = model(token, past_key_values=state.past_key_values)
    return torch.cat(out, 1), state


# ---- beams and choices of sequences
@pytest.mark.parametrize("options", [{}, {"decode": "grow"}, {"budget": 0.4}], ids=str)
def test_a_reordered_cache_is_that_of_its_sequences(model, options):
    """Beam i goes on as beam index[i]: everything moves, votes included."""
    ids, index = prompt(3), torch.tensor([2, 0, 0])
    tokens = prompt(3, 6, seed=4)
    with uncomp.patch(model, config(**options)), torch.no_grad():
        _, state = steps(model, model(ids), 3, prompt(3, 3, seed=5))
        state.past_key_values.reorder_cache(index)
        _, state = steps(model, state, 6, tokens)
        _, alone = steps(model, model(ids[index]), 3, prompt(3, 3, seed=5)[index])
        _, alone = steps(model, alone, 6, tokens)
        assert_same_cache(state.past_key_values, alone.past_key_values)
        torch.testing.assert_close(state.logits, alone.logits, atol=1e-5, rtol=0)


def test_reordering_keeps_the_arena_in_place(model):
    with uncomp.patch(model, config()), torch.no_grad():
        cache = model(prompt(3)).past_key_values
        tensors = [t.data_ptr() for layer in cache.uncomp.layers for t in layer.ragged.tensors()]
        cache.reorder_cache(torch.tensor([1, 1, 0]))
        assert tensors == [t.data_ptr() for layer in cache.uncomp.layers for t in layer.ragged.tensors()]


def test_repeat_and_select(model):
    ids, tokens = prompt(2), prompt(4, 5, seed=4)
    with uncomp.patch(model, config()), torch.no_grad():
        state = model(ids)
        state.past_key_values.batch_repeat_interleave(2)
        _, state = steps(model, state, 5, tokens)
        _, alone = steps(model, model(ids.repeat_interleave(2, 0)), 5, tokens)
        assert_same_cache(state.past_key_values, alone.past_key_values)
        state.past_key_values.batch_select_indices(torch.tensor([3]))
        assert state.past_key_values.uncomp.clock.batch == 1
        _, one = steps(model, model(ids[1:]), 5, tokens[3:])
        assert_same_cache(state.past_key_values, one.past_key_values)


def test_sequences_of_unequal_size_cannot_change_places(model):
    ids, mask = prompt(2), torch.ones(2, 60, dtype=torch.long)
    ids[1, :30], mask[1, :30] = 0, 0
    with uncomp.patch(model, config(budget=0.5)), torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
        cache.reorder_cache(torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="cannot change places"):
            cache.reorder_cache(torch.tensor([1, 0]))


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_under_eviction_repeats(model, beams):
    """Every beam's score is what its tokens get when they are fed alone."""
    ids = prompt()
    with uncomp.patch(model, config()), torch.no_grad():
        out = model.generate(
            ids,
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            length_penalty=0.0,
        )
        for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
            state, total = model(ids), 0.0
            for token in sequence[60:]:
                total += state.logits[0, -1].log_softmax(-1)[token].item()
                state = model(token.view(1, 1), past_key_values=state.past_key_values)
            assert total == pytest.approx(score.item(), abs=1e-3)


# ---- copies
@pytest.mark.parametrize("options", [{}, {"decode": "grow"}], ids=str)
def test_a_fork_goes_its_own_way(model, options):
    with uncomp.patch(model, config(**options)) as handle, torch.no_grad():
        cache = handle.new_cache()
        state = model(prompt(), past_key_values=cache)
        twin = cache.fork()
        left, _ = steps(model, state, 6)
        other = model(torch.tensor([[7]]), past_key_values=twin)
        steps(model, other, 3)
        assert twin.get_seq_length() == 64
        again = model(prompt(), past_key_values=handle.new_cache())
        right, _ = steps(model, again, 6)
        assert torch.equal(left, right)
        assert cache.memory_bytes() > 0


def test_deepcopy_of_a_swapped_cache(model):
    with uncomp.patch(model, config()), torch.no_grad():
        state = model(prompt())
        twin = copy.deepcopy(state.past_key_values)
        steps(model, state, 4)
        assert twin.get_seq_length() == 60
        model(torch.tensor([[7]]), past_key_values=twin)


def test_reset_starts_afresh(model):
    with uncomp.patch(model, config()) as handle, torch.no_grad():
        cache = handle.new_cache()
        first = model(prompt(), past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(prompt(), past_key_values=cache).logits, first, atol=1e-5, rtol=0)


# ---- crop
def remove(cache, tokens: int, present: int) -> None:
    """Takes tokens back in the way that the installed transformers does."""
    cache.crop(-tokens)
    assert cache.get_seq_length() == present - tokens


def test_crop_takes_back_appended_tokens(model):
    tokens = prompt(1, 9, seed=4)
    with uncomp.patch(model, config(decode="grow")), torch.no_grad():
        state = model(prompt())
        _, state = steps(model, state, 9, tokens)
        remove(state.past_key_values, 5, 69)
        state.past_key_values.crop(torch.tensor(-1))
        _, state = steps(model, state, 1, tokens[:, 3:])
        _, alone = steps(model, model(prompt()), 4, tokens)
        assert_same_cache(state.past_key_values, alone.past_key_values)
        with pytest.raises(ValueError, match="at most 12 tokens"):
            state.past_key_values.crop(-13)


def test_crop_of_an_evicting_cache_is_refused(model):
    with uncomp.patch(model, config()), torch.no_grad():
        cache = model(prompt()).past_key_values
        if compat.version() >= (5, 14, 0):
            cache.crop(0)
        with pytest.raises(ValueError, match="evicted tokens are gone"):
            cache.crop(-1)


# ---- later turns under eviction
@pytest.mark.parametrize(
    "options", [{}, {"budget": 0.4}, {"decode": "grow", "recompress_from": 4}, {"extend": "append"}], ids=str
)
def test_a_padded_later_turn_is_each_sequence_alone(model, options):
    """Turns of different lengths in a batch, pads between old and new tokens."""
    ids, new = prompt(3), prompt(3, 11, seed=7)
    mask = torch.ones(3, 71, dtype=torch.long)
    ids[1, :25], mask[1, :25] = 0, 0
    new[0, :4], mask[0, 60:64] = 0, 0
    new[2, :10], mask[2, 60:70] = 0, 0
    tokens = prompt(3, 5, seed=9)
    with uncomp.patch(model, config(**options)), torch.no_grad():
        state = model(ids, attention_mask=mask[:, :60], position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :60])
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, 60:]
        state = model(new, attention_mask=mask, position_ids=position, past_key_values=state.past_key_values)
        logits = state.logits[:, -1]
        for i in range(5):
            here = position[:, -1:] + 1 + i
            state = model(tokens[:, i : i + 1], position_ids=here, past_key_values=state.past_key_values)
        for row in range(3):
            first = ids[row : row + 1, mask[row, :60].argmax() :]
            second = new[row : row + 1, mask[row, 60:].argmax() :]
            alone = model(first)
            alone = model(second, past_key_values=alone.past_key_values)
            if second.shape[1] > 1:  # a single token is a decode step, which evicts instead of choosing again
                torch.testing.assert_close(logits[row], alone.logits[0, -1], atol=2e-5, rtol=0)
                _, alone = steps(model, alone, 5, tokens[row : row + 1])
                torch.testing.assert_close(state.logits[row], alone.logits[0], atol=2e-5, rtol=0)


def test_a_later_turn_returns_to_the_plan(model):
    with uncomp.patch(model, config()) as handle, torch.no_grad():
        state = model(prompt(2))
        state = model(prompt(2, 30, seed=2), past_key_values=state.past_key_values)
        stats = handle.stats()
        assert (stats["stored_tokens_min"], stats["stored_tokens_max"]) == (24, 24)
        assert stats["cache_bytes"] == 4 * 2 * 4 * 24 * 64 * 2 * 4
        assert stats["real_tokens"] == [90, 90]
        for position, *_ in arenas(state.past_key_values):
            assert position[-8:].tolist() == list(range(82, 90))


def test_appending_keeps_every_token_of_the_turn(model):
    with uncomp.patch(model, config(extend="append")) as handle, torch.no_grad():
        state = model(prompt())
        state = model(prompt(1, 30, seed=2), past_key_values=state.past_key_values)
        assert handle.stats()["stored_tokens_min"] == 54
        _, state = steps(model, state, 3)
        assert handle.stats()["stored_tokens_max"] == 54
        for position, *_ in arenas(state.past_key_values):
            assert position[-3:].tolist() == [90, 91, 92]


def test_chunks_of_a_prompt_store_the_plan(model):
    with uncomp.patch(model, config()) as handle:
        out = model.generate(prompt(), max_new_tokens=4, do_sample=False, prefill_chunk_size=13)
        assert out.shape == (1, 64)
        stats = handle.stats()
        assert (stats["stored_tokens_min"], stats["stored_tokens_max"]) == (24, 24)
