# SPDX-License-Identifier: Apache-2.0
"""patch and its handle: what they touch, what they refuse, and that removal gives back the very same model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import AttentionInterface

import uncomp
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf
CONFIG = uncomp.UncompConfig(policy="snapkv", budget=40)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def prompt(batch: int = 1, columns: int = 60, seed: int = 1):
    return torch.randint(3, 199, (batch, columns), generator=torch.Generator().manual_seed(seed))


def footprint(model):
    """Everything of a module tree that a patch could leave behind."""
    found = {}
    for name, module in model.named_modules():
        hooks = {k: len(v) for k, v in vars(module).items() if "hooks" in k and hasattr(v, "__len__")}
        own = sorted(k for k in vars(module) if not k.startswith("_"))
        found[name] = (hooks, own, vars(module).get("forward"), getattr(module, "_uncomp_handle", None))
    return found, model.config._attn_implementation, model.config.to_dict()


# ---- removal
def test_remove_gives_back_the_very_same_model(model):
    ids = prompt()
    before, stock = footprint(model), model.generate(ids, max_new_tokens=8, do_sample=False)
    handle = uncomp.patch(model, CONFIG)
    model.generate(ids, max_new_tokens=8, do_sample=False)
    handle.remove()
    handle.remove()
    assert footprint(model) == before
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), stock)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cache_waits_for_the_next_patch(family):
    """Without the patch it is refused in one line, however often, and then goes on as if nothing had been."""
    config = replace(CONFIG, skip_sliding=family != "llama")
    model, ids, more = tiny_model(family), prompt(), prompt(columns=7, seed=2)

    def turn(cache, begin, new):
        whole = torch.cat([begin, new], 1)
        return model.generate(whole, past_key_values=cache, max_new_tokens=6, do_sample=False)

    with uncomp.patch(model, config) as handle:
        cache = handle.new_cache()
        first = turn(cache, ids[:, :0], ids)
        twin, other = cache.fork(), cache.fork()
        want = turn(other, first, more)
    for again in (cache, twin, cache):
        with pytest.raises(RuntimeError, match="patch was removed; this cache can be used again"):
            turn(again, first, more)
    with uncomp.patch(model, config):
        for again in (cache, twin):
            assert torch.equal(turn(again, first, more), want)


def test_with_removes_on_an_exception(model):
    before = footprint(model)
    with pytest.raises(KeyError), uncomp.patch(model, CONFIG):
        raise KeyError
    assert footprint(model) == before


def test_other_models_do_not_meet(model):
    other = tiny_model("llama", seed=3)
    ids = prompt()
    stock = other.generate(ids, max_new_tokens=8, do_sample=False)
    with uncomp.patch(model, CONFIG):
        assert torch.equal(other.generate(ids, max_new_tokens=8, do_sample=False), stock)
        assert other.config._attn_implementation == "sdpa"
        with uncomp.patch(other, uncomp.UncompConfig(policy="snapkv", budget=50)) as second:
            model.generate(ids, max_new_tokens=8, do_sample=False)
            other.generate(ids, max_new_tokens=8, do_sample=False)
            assert second.stats()["stored_tokens_max"] == 50


# ---- stats
def test_stats_outlive_the_cache_but_the_cache_does_not(model):
    with uncomp.patch(model, CONFIG) as handle:
        with pytest.raises(RuntimeError, match="needs a forward"):
            handle.stats()
        model.generate(prompt(2), max_new_tokens=8, do_sample=False)
        assert handle.cache is None
        stats = handle.stats()
    assert stats["stored_tokens_min"] == stats["stored_tokens_max"] == 40
    assert stats["cache_bytes"] == 4 * 2 * 4 * 40 * 64 * 2 * 4
    assert stats["full_cache_bytes"] == 4 * 2 * 4 * 67 * 64 * 2 * 4
    assert stats["real_tokens"] == [67, 67]


# ---- refusals, each with its reason
def test_a_second_patch_is_refused(model):
    with uncomp.patch(model, CONFIG), pytest.raises(ValueError, match="patched already"):
        uncomp.patch(model, CONFIG)


def test_unknown_model_types_are_refused_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=1, vocab_size=32))
    with pytest.raises(NotImplementedError, match="'gpt2' is not supported; supported: llama"):
        uncomp.patch(gpt2, CONFIG)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"head_dim": 12}, "multiple of 8 up to 256; got 12"),
        ({"head_dim": 264}, "multiple of 8 up to 256; got 264"),
        ({"num_attention_heads": 32, "num_key_value_heads": 1}, "at most 16 query heads"),
    ],
    ids=str,
)
def test_sizes_that_no_kernel_takes_are_refused(overrides, wanted):
    with pytest.raises(NotImplementedError, match=wanted):
        uncomp.patch(tiny_model("llama", **overrides), CONFIG)


def test_dtypes_that_no_kernel_takes_are_refused():
    with pytest.raises(NotImplementedError, match=r"got torch\.float64"):
        uncomp.patch(tiny_model("llama").double(), CONFIG)


def test_configs_that_do_not_fit_the_model_are_refused(model):
    before = footprint(model)
    with pytest.raises(ValueError, match="groups"):
        uncomp.patch(model, uncomp.UncompConfig(groups=5))
    assert footprint(model) == before


def test_heads_that_are_not_those_of_the_config_are_refused(model):
    """As under tensor parallelism, where a rank sees a part of the heads."""
    cache = uncomp.UncompCache(tiny_model("llama", num_attention_heads=16, num_key_value_heads=8), CONFIG)
    model.set_attn_implementation("uncomp")
    try:
        with pytest.raises(NotImplementedError, match="made for 16 query and 8 key heads of 64 channels; got 8 and 4"):
            model(prompt(), past_key_values=cache)
    finally:
        model.set_attn_implementation("sdpa")


def test_a_profile_that_is_not_there_is_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="profile must be"):
        uncomp.patch(model, uncomp.UncompConfig(profile=str(tmp_path / "none.json")))
    (tmp_path / "cut.json").write_text('{"format": 1, "mod')
    with pytest.raises(ValueError, match=r"cut\.json is not a whole JSON file"):
        uncomp.patch(model, uncomp.UncompConfig(profile=str(tmp_path / "cut.json")))


def test_generate_options_that_need_another_cache_are_refused(model):
    with uncomp.patch(model, CONFIG):
        with pytest.raises(NotImplementedError, match="StaticCache"):
            model.generate(prompt(), max_new_tokens=4, cache_implementation="static")
        model.generate(prompt(), max_new_tokens=4)  # and the next request works


def test_the_text_generation_pipeline_compresses(model):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:196]
    names = ["<pad>", "<s>", "</s>", *alphabet]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.padding_side = "left"
    texts = ["a long prompt " * 8, "another prompt, a shorter one " * 3]
    with uncomp.patch(model, CONFIG) as handle:
        run = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2, device="cpu")
        run(texts, max_new_tokens=5, do_sample=False)
        assert handle.stats()["stored_tokens_max"] == 40
        assert handle.stats()["batch"] == 2


def test_sliding_layers_are_refused_or_left_alone():
    with pytest.raises(NotImplementedError, match="nothing to compress"):
        uncomp.patch(tiny_model("mistral", sliding_window=16), CONFIG)
    gemma = tiny_model("gemma3_text")
    with pytest.raises(NotImplementedError, match="skip_sliding=True"):
        uncomp.patch(gemma, CONFIG)
    with uncomp.patch(gemma, uncomp.UncompConfig(policy="snapkv", budget=40, skip_sliding=True)) as handle:
        gemma.generate(prompt(), max_new_tokens=4, do_sample=False)
        assert handle.stats()["other_layers"] == 2
        assert handle.facts.sliding == [0, 2]


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda m: StaticCache(m.config, max_cache_len=128), "StaticCache"),
        (lambda m: DynamicCache(config=m.config, offloading=True), "offloaded"),
    ],
    ids=["static", "offloaded"],
)
def test_foreign_caches_are_refused(model, make, wanted):
    with uncomp.patch(model, CONFIG), pytest.raises(NotImplementedError, match=wanted):
        model(prompt(), past_key_values=make(model))


def test_a_cache_that_holds_uncompressed_tokens_is_refused(model):
    cache = model(prompt()).past_key_values
    with uncomp.patch(model, CONFIG), pytest.raises(NotImplementedError, match="already holds tokens"):
        model(prompt(1, 5), past_key_values=cache)


def test_right_padding_is_refused(model):
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 50:] = 0
    with uncomp.patch(model, CONFIG), pytest.raises(ValueError, match="pads on the right"):
        model(prompt(2), attention_mask=mask)


def test_masks_with_four_dimensions_are_refused(model):
    with uncomp.patch(model, CONFIG), pytest.raises((NotImplementedError, ValueError), match=r"attention.mask"):
        model(prompt(), attention_mask=torch.ones(1, 1, 60, 60, dtype=torch.bool))


def test_positions_that_do_not_continue_are_refused(model):
    with uncomp.patch(model, CONFIG), torch.no_grad():
        state = model(prompt())
        with pytest.raises(ValueError, match="must continue at 60"):
            model(prompt(1, 5), past_key_values=state.past_key_values, position_ids=torch.arange(40, 45)[None])


def test_training_mode_and_attentions_are_refused(model):
    with uncomp.patch(model, CONFIG):
        model.train()
        try:
            with pytest.raises(NotImplementedError, match=r"model\.eval"):
                model(prompt())
        finally:
            model.eval()
        with pytest.raises((NotImplementedError, ValueError), match="output_attentions"):
            model(prompt(), output_attentions=True)


def test_another_batch_on_one_cache_is_refused(model):
    with uncomp.patch(model, CONFIG), torch.no_grad():
        state = model(prompt(2))
        with pytest.raises(ValueError, match="2 sequences; got a batch of 3"):
            model(prompt(3, 1), past_key_values=state.past_key_values)


def test_a_model_that_edits_keys_is_refused(model):
    """The stored keys would not be the attended ones."""
    from transformers.models.llama import modeling_llama

    real = modeling_llama.LlamaAttention.forward
    stock = AttentionInterface._global_mapping["uncomp"]

    def edits(module, query, key, value, *args, **kwargs):
        return stock(module, query, key * 1.0, value, *args, **kwargs)

    AttentionInterface._global_mapping["uncomp"] = edits
    try:
        with uncomp.patch(model, CONFIG), pytest.raises(NotImplementedError, match="changed the keys"):
            model(prompt())
    finally:
        AttentionInterface._global_mapping["uncomp"] = stock
    assert modeling_llama.LlamaAttention.forward is real


def test_without_our_mask_function_padding_would_be_ignored(model):
    """The registration of the mask function is what makes padding count."""
    from transformers.masking_utils import AttentionMaskInterface

    ids, mask = prompt(2), torch.ones(2, 60, dtype=torch.long)
    ids[1, :30], mask[1, :30] = 0, 0
    model.set_attn_implementation("uncomp")
    ours = AttentionMaskInterface._global_mapping.pop("uncomp")
    try:
        without = model(ids, attention_mask=mask, use_cache=False).logits
    finally:
        AttentionMaskInterface._global_mapping["uncomp"] = ours
    with_ours = model(ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    stock = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(with_ours[:, -1], stock[:, -1], atol=1e-5)
    assert not torch.allclose(without[1, -1], stock[1, -1], atol=1e-3)


# ---- failures in the middle of a forward
def test_a_failed_forward_breaks_its_cache_but_not_the_model(model):
    def explode(module, args, output):
        raise FloatingPointError

    ids = prompt()
    with uncomp.patch(model, CONFIG) as handle, torch.no_grad():
        good = model.generate(ids, max_new_tokens=8, do_sample=False)
        state = model(ids)
        hook = model.model.layers[2].register_forward_hook(explode)
        with pytest.raises(FloatingPointError):
            model(prompt(1, 1), past_key_values=state.past_key_values)
        hook.remove()
        with pytest.raises(RuntimeError, match="failed half-way"):
            model(prompt(1, 1), past_key_values=state.past_key_values)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), good)
        assert handle.stats()["stored_tokens_max"] == 40


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
def test_deleted_heads_save_their_share(model, rows):
    """Bytes fall by the deleted rows; the prompt's logits do not change, because its attention is whole."""
    ids, found = prompt(2), {}
    for deleted in (0, 1):
        config = uncomp.UncompConfig(budget=40, rows=rows, groups=1, delete_heads=deleted, delete_total=False)
        with uncomp.patch(model, config) as handle, torch.no_grad():
            first = model(ids).logits
            out = model.generate(ids, max_new_tokens=8, num_beams=2, do_sample=False)
            found[deleted] = first, out, handle.stats()
    (plain, _, whole), (first, out, stats) = found[0], found[1]
    assert torch.equal(plain, first) and out.shape[1] == ids.shape[1] + 8
    count = {"kv_head": model.config.num_key_value_heads, "query_head": model.config.num_attention_heads}[rows]
    assert stats["cache_bytes"] * count == whole["cache_bytes"] * (count - 1)
    assert stats["deleted_rows"] == stats["batch"] * stats["layers"] and stats["stored_tokens_min"] == 0
    assert stats["stored_tokens_mean"] == pytest.approx(40 * (count - 1) / count)
    assert whole["deleted_rows"] == 0
