# SPDX-License-Identifier: Apache-2.0
"""Stock generate on a patched model: with a budget that covers all it gives the stock tokens, whatever the call."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import uncomp
from uncomp.hf import compat
from uncomp.testing import tiny_model, tiny_model_types

pytestmark = pytest.mark.hf
EVERYTHING = ({"budget": 1.0}, {"budget": 400}, {"budget": 400, "decode": "grow", "max_new_tokens": 4})
NEW = 12


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def prompt(batch: int = 1, columns: int = 60, seed: int = 1):
    return torch.randint(3, 199, (batch, columns), generator=torch.Generator().manual_seed(seed))


def padded(batch: int = 3, columns: int = 60, seed: int = 1):
    """A left-padded batch; the second sequence is one token short of the width, the third has 17 tokens."""
    ids, mask = prompt(batch, columns, seed), torch.ones(batch, columns, dtype=torch.long)
    for row, pads in zip(range(1, batch), (1, columns - 17), strict=False):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return ids, mask


def run(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(ids, attention_mask=mask, **options)


def same(model, call, **config):
    """What `call` gives on the patched model equals what it gives on the stock one."""
    stock = call(model)
    for options in EVERYTHING:
        with uncomp.patch(model, uncomp.UncompConfig(policy="snapkv", **options, **config)):
            ours = call(model)
        if stock.is_floating_point():  # products of equal matrices may differ in the last bit from run to run
            torch.testing.assert_close(ours, stock, atol=2e-5, rtol=0)
        else:
            assert torch.equal(stock, ours), options


# ---- calls that must give the stock tokens
def test_one_prompt(model):
    same(model, lambda m: run(m, prompt()))


def test_padded_batch(model):
    same(model, lambda m: run(m, *padded()))


def test_one_token_prompts(model):
    ids, mask = padded(3, 4)
    mask[2], ids[2] = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 9])
    same(model, lambda m: run(m, prompt(1, 1)))
    same(model, lambda m: run(m, ids, mask))


@pytest.mark.parametrize("chunk", [1, 7, 16, 59])
def test_chunked_prefill(model, chunk):
    same(model, lambda m: run(m, prompt(), prefill_chunk_size=chunk))


@pytest.mark.parametrize("chunk", [1, 16])
def test_chunked_prefill_of_a_padded_batch(model, chunk):
    same(model, lambda m: run(m, *padded(), prefill_chunk_size=chunk))


def test_beam_search(model):
    same(model, lambda m: run(m, prompt(), num_beams=3))


def test_beam_search_of_a_padded_batch(model):
    same(model, lambda m: run(m, *padded(), num_beams=2, num_return_sequences=2))


def test_sampling_with_several_sequences(model):
    def call(m):
        torch.manual_seed(5)
        return run(m, *padded(2), do_sample=True, num_return_sequences=3, temperature=0.7)

    same(model, call)


def test_inputs_embeds(model):
    embeds = model.get_input_embeddings()(prompt())
    same(model, lambda m: m.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False))


def test_no_cache(model):
    same(model, lambda m: run(m, *padded(), use_cache=False))


def test_plain_calls(model):
    ids, mask = padded()
    same(model, lambda m: m(ids, attention_mask=mask, use_cache=False).logits[:, -1])
    same(model, lambda m: m(ids).logits)
    with torch.no_grad():
        same(model, lambda m: m(ids, attention_mask=mask).logits[:, -1].argmax(-1))


def test_step_by_step_with_the_returned_cache(model):
    def call(m):
        ids, out = prompt(2), []
        with torch.no_grad():
            state = m(ids)
            for _ in range(5):
                token = state.logits[:, -1:].argmax(-1)
                out.append(token)
                state = m(token, past_key_values=state.past_key_values)
        return torch.cat(out, 1)

    same(model, call)


def test_output_hidden_states(model):
    same(model, lambda m: torch.stack(m(prompt(), output_hidden_states=True).hidden_states))


def test_prompt_lookup_decoding(model):
    repeated = prompt(1, 12).repeat(1, 5)
    stock = run(model, repeated, prompt_lookup_num_tokens=4)
    config = uncomp.UncompConfig(policy="snapkv", budget=400, decode="grow")
    with uncomp.patch(model, config):
        assert torch.equal(stock, run(model, repeated, prompt_lookup_num_tokens=4))


@pytest.mark.parametrize("budget", [1.0, 400])
def test_more_drafts_than_the_window_are_taken_back_where_nothing_was_dropped(model, budget):
    ids = prompt(1, 60)
    ids[0, -3:] = ids[0, 10:13]  # drafts come from behind the first occurrence
    stock = run(model, ids, prompt_lookup_num_tokens=20)
    with uncomp.patch(model, uncomp.UncompConfig(budget=budget, decode="grow")):
        assert torch.equal(stock, run(model, ids, prompt_lookup_num_tokens=20))
    with (
        uncomp.patch(model, uncomp.UncompConfig(budget=30, decode="grow")),
        pytest.raises(ValueError, match="at most 8 tokens can be cropped, because older ones were compressed"),
    ):
        run(model, ids, prompt_lookup_num_tokens=20)


def turns(m, ids, mask, *, only_new=False):
    """Two turns on one cache: all ids again, or only the new ones."""
    first = run(m, ids, mask, return_dict_in_generate=True)
    new = prompt(ids.shape[0], 9, seed=2)
    whole = torch.cat([first.sequences, new], 1)
    mask = torch.cat([mask, torch.ones(ids.shape[0], whole.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
    cache = first.past_key_values
    if only_new:
        given = whole[:, cache.get_seq_length() :]
        with torch.no_grad():
            position = mask.cumsum(-1)[:, -given.shape[1] :] - 1
            return m(given, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1].argmax(-1)
    return run(m, whole, mask, past_key_values=cache)


@pytest.mark.parametrize("only_new", [False, True])
def test_second_turn(model, only_new):
    ids = prompt()
    same(model, lambda m: turns(m, ids, torch.ones_like(ids), only_new=only_new))
    same(model, lambda m: turns(m, *padded(), only_new=only_new))


def test_second_turn_equals_one_prompt(model):
    ids, mask = padded()
    stock_first = run(model, ids, mask)
    whole = torch.cat([stock_first, prompt(3, 9, seed=2)], 1)
    mask_of_whole = torch.cat([mask, torch.ones(3, whole.shape[1] - 60, dtype=mask.dtype)], 1)
    stock = run(model, whole, mask_of_whole)
    with uncomp.patch(model, uncomp.UncompConfig(policy="snapkv", budget=400)):
        assert torch.equal(turns(model, ids, mask), stock)


def test_finished_sequences_are_voided_in_the_next_turn(model):
    """A sequence that ended early is fed pads; the next turn's mask takes them back."""
    ids, mask = padded(2)
    stock_first = run(model, ids, mask)

    def call(m):
        state = run(m, ids, mask, return_dict_in_generate=True)
        new = prompt(2, 7, seed=3)
        whole = torch.cat([state.sequences, new], 1)
        whole_mask = torch.cat([mask, torch.ones(2, whole.shape[1] - 60, dtype=mask.dtype)], 1)
        whole_mask[0, 64 : 60 + NEW] = 0  # the first sequence ended after four tokens
        return run(m, whole, whole_mask, past_key_values=state.past_key_values)

    whole = torch.cat([stock_first, prompt(2, 7, seed=3)], 1)
    whole_mask = torch.cat([mask, torch.ones(2, whole.shape[1] - 60, dtype=mask.dtype)], 1)
    whole_mask[0, 64 : 60 + NEW] = 0
    stock = run(model, whole, whole_mask)[:, whole.shape[1] :]
    for options in EVERYTHING:
        with uncomp.patch(model, uncomp.UncompConfig(policy="snapkv", **options)):
            assert torch.equal(call(model)[:, whole.shape[1] :], stock), options


def test_chunked_second_turn(model):
    ids = prompt()

    def call(m):
        state = run(m, ids, return_dict_in_generate=True)
        whole = torch.cat([state.sequences, prompt(1, 21, seed=3)], 1)
        return run(m, whole, past_key_values=state.past_key_values, prefill_chunk_size=8)

    if compat.has_chunked_turns():
        same(model, call)
        return
    with (
        uncomp.patch(model, uncomp.UncompConfig(policy="snapkv", budget=400)),
        pytest.raises(ValueError, match=r"5\.21"),
    ):
        call(model)


def test_without_patch(model):
    ids, mask = padded()
    stock = run(model, ids, mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("uncomp")
    try:
        assert torch.equal(run(model, ids, mask), stock)  # exact attention, no compression
        for options in EVERYTHING:
            cache = uncomp.UncompCache(model, uncomp.UncompConfig(policy="snapkv", **options))
            assert torch.equal(run(model, ids, mask, past_key_values=cache), stock)
            assert cache.get_seq_length() == 60 + NEW - 1
    finally:
        model.set_attn_implementation(before)


def test_cache_of_ours_under_another_attention_is_refused(model):
    with pytest.raises(RuntimeError, match='attn_implementation="uncomp"'):
        run(model, prompt(), past_key_values=uncomp.UncompCache(model, uncomp.UncompConfig(policy="snapkv")))


# ---- families
@pytest.mark.parametrize("kind", tiny_model_types())
def test_every_family(kind):
    family = tiny_model(kind)
    ids, mask = padded()
    for call in (
        lambda m: run(m, ids, mask),
        lambda m: run(m, prompt(), prefill_chunk_size=16),
        lambda m: m(prompt()).logits,
        lambda m: turns(m, ids, mask),
    ):
        same(family, call, skip_sliding=True)
    before = run(family, ids, mask)
    with uncomp.patch(family, uncomp.UncompConfig(policy="snapkv", budget=40, skip_sliding=True)) as handle:
        out = run(family, ids, mask, return_dict_in_generate=True)
        stats = handle.stats()
        assert stats["stored_tokens_max"] == 40
        assert stats["cache_bytes"] == stats["layers"] * 3 * 4 * 40 * 64 * 2 * 4
        assert out.past_key_values.get_seq_length() == 60 + NEW - 1
    assert torch.equal(run(family, ids, mask), before)


# ---- a padded batch is its sequences alone
@pytest.mark.parametrize("options", [{}, {"decode": "grow"}, {"rows": "query_head"}], ids=str)
@pytest.mark.parametrize("budget", [36, 0.5])
def test_padded_batch_is_each_prompt_alone(model, budget, options):
    ids, mask = padded()
    config = uncomp.UncompConfig(policy="snapkv", budget=budget, window=8, **options)
    with uncomp.patch(model, config):
        whole = run(model, ids, mask)
        for row in range(3):
            alone = ids[row : row + 1, mask[row].argmax() :]
            assert torch.equal(run(model, alone)[0, -NEW:], whole[row, -NEW:])


# ---- what is stored
def test_stored_length_never_changes_while_evicting(model):
    config = uncomp.UncompConfig(policy="snapkv", budget=40)
    with uncomp.patch(model, config) as handle, torch.no_grad():
        state = model(prompt(2))
        for step in range(10):
            stats = handle.stats()
            assert stats["stored_tokens_min"] == stats["stored_tokens_max"] == 40
            assert stats["real_tokens"] == [60 + step] * 2
            pointers = [layer.ragged.key_rows.data_ptr() for layer in state.past_key_values.uncomp.layers]
            state = model(state.logits[:, -1:].argmax(-1), past_key_values=state.past_key_values)
            assert pointers == [layer.ragged.key_rows.data_ptr() for layer in state.past_key_values.uncomp.layers]


def test_growing_stores_every_new_token(model):
    config = uncomp.UncompConfig(policy="snapkv", budget=40, decode="grow", max_new_tokens=5)
    with uncomp.patch(model, config) as handle:
        kept = run(model, prompt(2), return_dict_in_generate=True)
        stats = handle.stats()
    assert kept is not None
    assert stats["stored_tokens_min"] == stats["stored_tokens_max"] == 40 + NEW - 1


def test_memory_is_freed_with_the_cache(model):
    import gc
    import weakref

    with uncomp.patch(model, uncomp.UncompConfig(policy="snapkv", budget=40)):
        out = run(model, prompt(), return_dict_in_generate=True)
        arena = weakref.ref(out.past_key_values.uncomp.layers[0].ragged.key_rows)
        del out
        gc.collect()
        assert arena() is None
