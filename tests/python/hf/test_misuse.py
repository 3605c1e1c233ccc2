# SPDX-License-Identifier: Apache-2.0
"""Calls at the edge of what a cache can do: the stock result, or an error that says what to change; never silence."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

pytest.importorskip("transformers")

import uncomp
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf
EVERYTHING = ({"budget": 1.0}, {"budget": 400}, {"budget": 400, "decode": "grow"})


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def prompt(batch: int = 1, columns: int = 60, seed: int = 1):
    return torch.randint(3, 199, (batch, columns), generator=torch.Generator().manual_seed(seed))


def call(model, ids, mask, cache=None):
    """A forward at the end of a padded batch, with the positions that generate would give."""
    position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=position, past_key_values=cache)


# ---- a single new column
@pytest.mark.parametrize("options", EVERYTHING, ids=str)
def test_a_single_padded_column_stores_nothing(model, options):
    """A later turn of one column that is padding in one sequence."""
    ids, mask = prompt(2, 24), torch.ones(2, 24, dtype=torch.long)
    ids[1, :7], mask[1, :7] = 0, 0
    mask[0, 20] = 0

    def story(m):
        state = call(m, ids[:, :20], mask[:, :20])
        for column in range(20, 24):
            state = call(m, ids[:, column : column + 1], mask[:, : column + 1], state.past_key_values)
        return state.logits

    stock = story(model)
    with uncomp.patch(model, uncomp.UncompConfig(policy="snapkv", **options)):
        torch.testing.assert_close(story(model), stock, atol=2e-5, rtol=0)


def test_a_mask_of_another_width_is_refused_at_one_token(model):
    ids = prompt()
    with uncomp.patch(model, uncomp.UncompConfig(budget=40)), torch.no_grad():
        cache = model(ids).past_key_values
        with pytest.raises(ValueError, match=r"must be \[1, 61\]"):
            model(prompt(1, 1), attention_mask=torch.ones(1, 3), past_key_values=cache)


# ---- crop after a padded turn
@pytest.mark.parametrize("options", [{"budget": 1.0}, {"budget": 400, "decode": "grow"}], ids=str)
@pytest.mark.parametrize("remove", [1, 4, 6, 9])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_crop_takes_back_columns_not_tokens(model, options, remove, side):
    ids, mask = prompt(2, 33), torch.ones(2, 33, dtype=torch.long)
    ids[1, :7], mask[1, :7] = 0, 0
    pads = slice(20, 26) if side == "left" else slice(23, 29)
    ids[1, pads], mask[1, pads] = 0, 0

    def story(m):
        state = call(m, ids[:, :20], mask[:, :20])
        state = call(m, ids[:, 20:29], mask[:, :29], state.past_key_values)
        state.past_key_values.crop(-remove)
        left = mask[:, : 29 - remove]
        return call(m, ids[:, 29:], torch.cat([left, mask[:, 29:]], 1), state.past_key_values).logits

    stock = story(model)
    with uncomp.patch(model, uncomp.UncompConfig(policy="snapkv", **options)):
        torch.testing.assert_close(story(model), stock, atol=2e-5, rtol=0)


# ---- policies that break their contract
def broken(name, **members):
    return uncomp.register_policy(type(name, (uncomp.Policy,), {"name": name, **members}))


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        (
            {"score": lambda self, view: uncomp.Policy.score(self, view)[:, :-1]},
            r"must be \[4, 60\] float32; got \[4, 59\]",
        ),
        ({"score": lambda self, view: None}, "float32; got NoneType"),
        ({"limits": lambda self, request: None}, r"must be \[1, 4\] int32; got NoneType"),
        ({"scope": "model", "limits": lambda self, r: uncomp.Policy.limits(self, r) + 1}, "must sum to"),
    ],
    ids=["narrow", "none", "limits", "total"],
)
def test_a_policy_that_breaks_its_contract_is_named(model, members, wanted):
    made = broken(f"broken_{wanted[:9]}_{len(members)}", **members)
    config = uncomp.UncompConfig(policy=made.name, budget=20)
    with uncomp.patch(model, config), pytest.raises(ValueError, match=wanted):
        model(prompt())


def test_only_policies_register():
    with pytest.raises(TypeError, match=r"subclass of uncomp\.Policy"):
        uncomp.register_policy(dict)


# ---- arguments of another kind
def test_what_is_no_model_or_config_is_named(model):
    for wrong in (None, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="model must be a model of transformers"):
            uncomp.patch(wrong)
    for wrong in ({"budget": 16}, "tuned"):
        with pytest.raises(TypeError, match="config must be an UncompConfig"):
            uncomp.patch(model, wrong)
        with pytest.raises(TypeError, match="config must be an UncompConfig"):
            uncomp.UncompCache(model, wrong)


@pytest.mark.parametrize("budget", [2**25, 2**62, 99999999999999999999])
def test_absurd_budgets_are_refused(budget):
    with pytest.raises(ValueError, match="at most 16777216 tokens"):
        uncomp.UncompConfig(budget=budget)


# ---- a cache of ours under another attention
def test_a_one_layer_cache_under_another_attention_does_not_harm_others(model):
    single = tiny_model("llama", num_hidden_layers=1)
    cache = uncomp.UncompCache(single, uncomp.UncompConfig(budget=16))
    single(prompt(), past_key_values=cache)
    with uncomp.patch(model, uncomp.UncompConfig(budget=40)):
        model.generate(prompt(), max_new_tokens=3, do_sample=False)
    single.set_attn_implementation("uncomp")
    with pytest.raises(RuntimeError, match="start with a new cache"):
        single(prompt(), past_key_values=cache)


def test_a_refused_mask_leaves_the_cache_usable(model):
    cache = None
    with uncomp.patch(model, uncomp.UncompConfig(budget=1.0)) as handle, torch.no_grad():
        cache = handle.new_cache()
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(prompt(), attention_mask=torch.ones(1, 3), past_key_values=cache)
    model.set_attn_implementation("uncomp")
    try:
        got = model(prompt(), past_key_values=cache).logits
    finally:
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, model(prompt()).logits, atol=2e-5, rtol=0)


# ---- threads and autocast
def test_threads_share_a_patched_model(model):
    config, results = uncomp.UncompConfig(budget=40), {}
    prompts = [prompt(1, 60, seed) for seed in range(4)]
    with uncomp.patch(model, config):
        wanted = [model.generate(ids, max_new_tokens=8, do_sample=False) for ids in prompts]

        def work(number):
            results[number] = model.generate(prompts[number], max_new_tokens=8, do_sample=False)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[i], wanted[i]) for i in range(4))


def test_autocast_runs(model):
    with torch.autocast("cpu", torch.bfloat16):
        stock = model(prompt()).logits
        with uncomp.patch(model, uncomp.UncompConfig(budget=1.0)):
            ours = model(prompt()).logits
            model.generate(prompt(), max_new_tokens=3, do_sample=False)
    assert torch.equal(ours, stock)


def test_a_reader_that_hangs_up_gets_no_traceback():
    command = f"{sys.executable} -m uncomp info | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("prefill", [None, {"stages": [0, 1]}], ids=["whole", "pruned"])
@pytest.mark.parametrize("shape", [(1, 0), (0, 5), (7,)], ids=str)
def test_no_token_at_all(shape, prefill):
    model, wanted = tiny_model("llama"), r"^uncomp: a forward needs \[B, T\] tokens, B and T at least 1; got"
    with uncomp.patch(model, uncomp.UncompConfig(prefill=prefill)), pytest.raises(ValueError, match=wanted):
        model(torch.zeros(shape, dtype=torch.long), use_cache=True, logits_to_keep=1)
