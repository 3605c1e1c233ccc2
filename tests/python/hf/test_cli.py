# SPDX-License-Identifier: Apache-2.0
"""`uncomp generate` on a tiny saved model: text, JSON, comparison, figure, and what only a loaded model can refuse."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

import uncomp  # noqa: E402
from hf.test_load import make_folder  # noqa: E402
from uncomp import cli, generation  # noqa: E402
from uncomp.hf.load import load_model  # noqa: E402

pytestmark = pytest.mark.hf
KEYS = ["policy", "budget", "prompt_tokens", "new_tokens", "text"]
KEYS += ["stored_tokens_mean", "stored_tokens_min", "stored_tokens_max"]
KEYS += ["cache_bytes", "state_bytes", "full_cache_bytes"]
KEYS += ["prefill_seconds", "decode_tokens_per_second", "peak_bytes"]
PROMPT = "the quick brown fox jumps over the lazy dog, twice a day and once at night"  # a byte is a token
SMALL = ("--budget", "24", "--max-new-tokens", "6", "--min-new-tokens", "6", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    make_folder(path)
    return path


def call(folder, capsys, *options):
    """(status, stdout, stderr)"""
    try:
        status = cli.main(["generate", "--model", str(folder), *options])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def as_json(folder, capsys, *options):
    status, out, err = call(folder, capsys, "--prompt", PROMPT, *SMALL, "--json", *options)
    assert status == 0 and err == "", err
    return json.loads(out)


def refused(folder, capsys, *options):
    status, out, err = call(folder, capsys, *options)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    return err


# ---- what is printed
def test_json(folder, capsys):
    """Every key, and bytes as the plan says: 2 layers, 2 KV heads, mean 24 tokens of 8 + 8 channels in float32."""
    found = as_json(folder, capsys)
    assert list(found) == KEYS
    assert (found["policy"], found["budget"], found["prompt_tokens"], found["new_tokens"]) == ("uncomp", 24, 74, 6)
    assert found["stored_tokens_mean"] == 24
    assert found["stored_tokens_min"] < 24 < found["stored_tokens_max"]
    assert found["cache_bytes"] == 2 * 2 * 24 * 16 * 4
    assert found["full_cache_bytes"] == 2 * 2 * (74 + 5) * 16 * 4
    assert found["prefill_seconds"] > 0 and found["decode_tokens_per_second"] > 0
    assert found["peak_bytes"] is None or found["peak_bytes"] > 0


def test_compare(folder, capsys):
    found = as_json(folder, capsys, "--compare")
    assert list(found) == [*KEYS, "compare"]
    full = found["compare"]
    assert list(full) == [*KEYS, "agreement"]
    assert (full["policy"], full["budget"]) == ("full", None)
    assert full["cache_bytes"] == full["full_cache_bytes"] == found["full_cache_bytes"]
    assert full["stored_tokens_mean"] == full["stored_tokens_min"] == full["stored_tokens_max"] == 79
    assert 0 <= full["agreement"] <= 1


def test_a_budget_for_everything_agrees(folder, capsys):
    found = as_json(folder, capsys, "--compare", "--budget", "1.0")
    assert found["compare"]["agreement"] == 1.0
    assert found["text"] == found["compare"]["text"]


def test_lines(folder, capsys):
    status, out, err = call(folder, capsys, "--prompt", PROMPT, *SMALL, "--compare")
    assert (status, err) == (0, "")
    for word in ("[uncomp]", "[full]", "prompt tokens", "stored tokens", "24.0 (", "MiB", "tokens/s", "equal tokens"):
        assert word in out
    status, out, err = call(folder, capsys, "--prompt", PROMPT, *SMALL)
    assert status == 0 and "equal tokens" not in out


def test_options_reach_the_cache(folder, capsys):
    found = as_json(folder, capsys, "--policy", "snapkv", "--window", "4", "--sinks", "2", "--decode", "grow")
    assert (found["policy"], found["stored_tokens_mean"]) == ("snapkv", 24 + 5)
    found = as_json(folder, capsys, "--rows", "query_head", "--groups", "4", "--order", "random", "--seed", "3")
    assert found["cache_bytes"] == 2 * 4 * 24 * 16 * 4
    found = as_json(folder, capsys, "--shape", "16,32")
    assert (found["stored_tokens_min"], found["stored_tokens_max"]) == (16, 32)
    found = as_json(folder, capsys, "--extreme", "12", "--entropy-kind", "variance")
    assert (found["stored_tokens_min"], found["stored_tokens_max"]) == (12, 36)
    found = as_json(folder, capsys, "--delete-heads", "1")
    assert (found["stored_tokens_min"], found["stored_tokens_max"]) == (0, 48)


def test_prompts_are_pruned(folder, capsys):
    """The model has 2 layers; its prompt of 74 tokens loses 50 before the second."""
    whole = as_json(folder, capsys, "--policy", "full")
    for options in (["--stages", "0,1"], ["--policy", "uncomp_stage", "--stages", "0,1"]):
        found = as_json(folder, capsys, "--budget", "1.0", "--n-min", "24", *options)
        assert found["policy"] == ("uncomp_stage" if "--policy" in options else "uncomp")
        assert (found["stored_tokens_min"], found["stored_tokens_max"]) == (24 + 5, 74 + 5)
    found = as_json(folder, capsys, "--policy", "full", "--stages", "0,1", "--n-min", "0.5", "--compare")
    assert (found["stored_tokens_min"], found["stored_tokens_max"]) == (37 + 5, 74 + 5)
    found = as_json(folder, capsys, "--policy", "full", "--stages", "0,1")  # n_min is 1536
    assert found["text"] == whole["text"]
    err = refused(folder, capsys, "--prompt", PROMPT, *SMALL, "--policy", "uncomp_stage")
    assert "no profile of this model comes with the package" in err
    assert "below 2 layers; got [0, 2]" in refused(folder, capsys, "--prompt", PROMPT, *SMALL, "--stages", "0,2")


def test_prompt_file_and_progress(folder, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    options = ("--prompt-file", str(tmp_path / "prompt.txt"), *SMALL, "--json", "--progress", "--compare")
    status, out, err = call(folder, capsys, *options)
    assert status == 0
    assert json.loads(out)["prompt_tokens"] == 74
    assert "uncomp: prefill" in err and "full cache: 6 tokens" in err


def test_chat(folder, capsys, tmp_path):
    """The template is applied once, without special tokens of the tokenizer's own."""
    model, tokenizer = load_model(folder)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}<end>{% endfor %}"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    status, out, _ = call(tmp_path, capsys, "--prompt", PROMPT, *SMALL, "--json", "--chat")
    assert status == 0 and json.loads(out)["prompt_tokens"] == 74 + 2


@pytest.mark.parametrize("policy", ["uncomp", "snapkv"])
def test_figure(folder, capsys, tmp_path, policy):
    """With and without entropies; the file is a picture of its kind."""
    pytest.importorskip("matplotlib")
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        as_json(folder, capsys, "--policy", policy, "--window", "8", "--figure", str(tmp_path / name), "--compare")
        assert (tmp_path / name).read_bytes().startswith(start)


# ---- what is refused
def test_models_that_are_none(capsys, tmp_path):
    assert "does not exist; give a folder" in refused(tmp_path / "none", capsys, "--prompt", "a")
    assert "neither config.json nor a .gguf file" in refused(tmp_path, capsys, "--prompt", "a")


def test_prompts_that_do_not_fit(folder, capsys):
    err = refused(folder, capsys, "--prompt", "a" * 120, "--max-new-tokens", "9")
    assert "prompt of 120 tokens and 9 new ones must fit the model's 128 positions" in err
    assert "max_new_tokens must be at least 1; got 0" in refused(
        folder, capsys, "--prompt", "a", "--max-new-tokens", "0"
    )
    assert "the model has no chat template" in refused(folder, capsys, "--prompt", "a", "--chat")
    assert "groups must lie in [1, 2]" in refused(folder, capsys, "--prompt", "a", "--groups", "3")


def test_a_profile_that_is_none(folder, capsys, tmp_path):
    (tmp_path / "profile.json").write_text("{")
    refused(folder, capsys, "--prompt", "a", "--profile", str(tmp_path / "profile.json"))


def test_a_model_that_cannot_be_compressed(folder, capsys, tmp_path):
    _, tokenizer = load_model(folder)
    sizes = {"vocab_size": 260, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "model type 'gpt2' is not supported; supported: llama" in refused(tmp_path, capsys, "--prompt", "a")


# ---- the function behind it
def test_run_leaves_the_model_alone(folder):
    model, tokenizer = load_model(folder)
    ids = generation.encode(tokenizer, PROMPT)
    before, attention = model(ids).logits, model.config._attn_implementation
    report = generation.run(model, tokenizer, ids, uncomp.UncompConfig(budget=24), 4, min_new_tokens=4)
    assert model.config._attn_implementation == attention
    assert torch.equal(model(ids).logits, before)
    assert [len(report.stored), len(report.stored[0])] == [2, 2]
    assert [len(report.entropy), len(report.entropy[0])] == [2, 2]
    with pytest.raises(ValueError, match=r"the prompt must be \[1, S\]"):
        generation.run(model, tokenizer, ids[:, :0], None, 4)


def test_what_is_measured_is_what_generate_gives(folder):
    model, tokenizer = load_model(folder)
    ids = generation.encode(tokenizer, PROMPT)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
    for config in (None, uncomp.UncompConfig(budget=24)):
        report = generation.run(model, tokenizer, ids, config, 8)
        handle = uncomp.patch(model, config) if config else None
        assert model.generate(ids, **options)[0, ids.shape[1] :].tolist() == report.tokens
        if handle:
            handle.remove()


def test_one_token_has_no_decode_speed(folder):
    model, tokenizer = load_model(folder)
    report = generation.run(model, tokenizer, generation.encode(tokenizer, "a"), None, 1)
    assert report.new_tokens == 1 and report.decode_tokens_per_second is None
    assert generation.agreement(report, report) == 1.0


@pytest.mark.parametrize(("native", "wanted"), [(True, "auto"), (False, "float32")])
def test_auto_is_float32_on_a_cpu_that_is_slow_at_half_precision(monkeypatch, native, wanted):
    from uncomp.hf import environment

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert environment.best_dtype("auto", "cpu") == wanted
    assert environment.best_dtype("bfloat16", "cpu") == "bfloat16"
    assert environment.best_dtype("auto", "cuda:0") == "auto"
