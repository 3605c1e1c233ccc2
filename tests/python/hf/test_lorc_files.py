# SPDX-License-Identifier: Apache-2.0
"""Compressed models in folders: what `uncomp lorc` writes, and that it comes back as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")

from lorc_support import prompt, with_biases

from uncomp import cli, lorc
from uncomp.hf.load import load_model
from uncomp.testing import example_text, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a model of biases and a tied output matrix."""
    folder = tmp_path_factory.mktemp("models") / "source"
    with_biases(tiny_model("qwen2", vocab_size=260, num_hidden_layers=2, tie_word_embeddings=True)).save_pretrained(
        folder
    )
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(capsys, *words) -> tuple[int, str, str]:
    status = cli.main([str(word) for word in words])
    told = capsys.readouterr()
    return status, told.out, told.err


@torch.no_grad()
def logits(model):
    return model(prompt()[0]).logits


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """The folder that the command wrote, and its answer."""
    out = tmp_path_factory.mktemp("out") / "small"
    words = ["lorc", "--model", source, "--rho", "0.5,0.75", "--out", out, "--device", "cpu", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda text, **kwargs: said.append(text))
        assert cli.main([str(word) for word in words]) == 0
    return out, json.loads(said[-1])


def test_the_command_writes_a_model_that_comes_back(source, written):
    out, values = written
    assert values["rank_k"] == [48, 16] and values["rank_v"] == [64, 32]
    model, tokenizer = load_model(source)
    lorc.compress(model, lorc.LorcConfig.from_dict(values["config"]))
    for loaded, found in (lorc.load(out), load_model(out)):
        assert torch.equal(logits(loaded), logits(model))
        assert len(found) == len(tokenizer)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert not loaded.training
    half, _ = lorc.load(out, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    size = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (source, out)]
    assert size[1] < size[0]


def test_from_pretrained_and_attach_are_load(written):
    from transformers import AutoModelForCausalLM

    out, _ = written
    model = AutoModelForCausalLM.from_pretrained(out)
    handle = lorc.attach(model, out)
    assert torch.equal(logits(model), logits(lorc.load(out)[0]))
    assert handle.ranks.key == (48, 16)
    with pytest.raises(RuntimeError, match="original weights were not kept"):
        handle.remove()
    with pytest.raises(ValueError, match=r"^uncomp\.lorc\.load: the model is compressed already"):
        lorc.attach(model, out)


def test_generate_takes_the_folder(written, capsys):
    words = ("--prompt", "a" * 60, "--max-new-tokens", 3, "--device", "cpu", "--json", "--window", 4)
    status, out, _ = run(capsys, "generate", "--model", written[0], *words, "--budget", 20)
    told = json.loads(out)
    assert status == 0 and told["cache_bytes"] == 4 * 4 * 20 * sum((48, 16, 64, 32))


def test_whitening_and_absorbed_keys_and_whole_layers_come_back(tmp_path):
    """Layers above the threshold have no factors in the file; absorbed keys have some of queries."""
    model = tiny_model("llama", num_hidden_layers=3, attention_bias=True)
    model.model.rotary_emb.inv_freq.zero_()
    config = lorc.LorcConfig(rho=0.5, key_mode="absorb", whiten="calib", threshold=0.0)
    handle = lorc.compress(with_biases(model), config, calibration=prompt()[0])
    assert handle.ranks.key == (None, None, 32)
    handle.save_pretrained(tmp_path / "small")
    other = with_biases(tiny_model("llama", num_hidden_layers=3, attention_bias=True))
    other.model.rotary_emb.inv_freq.zero_()
    lorc.attach(other, tmp_path / "small")
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("mode", ["rebuild", "absorb"])
def test_fused_projections_come_back(tmp_path, mode):
    """Queries are in the file too: the fused weight is not."""
    models = [tiny_model("phi3", num_hidden_layers=2, seed=seed) for seed in (0, 0)]
    for model in models if mode == "absorb" else ():
        model.model.rotary_emb.inv_freq.zero_()
    lorc.compress(models[0], lorc.LorcConfig(rho=0.5, key_mode=mode)).save_pretrained(tmp_path / "small")
    with torch.no_grad():
        for layer in models[1].model.layers:
            layer.self_attn.qkv_proj.weight.zero_()
    lorc.attach(models[1], tmp_path / "small")
    assert torch.equal(logits(models[1]), logits(models[0]))


def test_the_command_calibrates_on_texts_and_prints_lines(source, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(example_text()[:6000])
    options = ("--whiten", text, "--samples", 2, "--seqlen", 64, "--rank-k", 32, "--rank-v", "64,32")
    options += ("--granularity", "group:2")
    status, out, _ = run(capsys, "lorc", "--model", source, *options, "--out", tmp_path / "w", "--device", "cpu")
    assert status == 0
    assert (
        "ranks of keys      32 32" in out and "ranks of values    64 32" in out and "channels kept      62.50 %" in out
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt", "w"]


# ---- refusals: one line, nothing written
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--rho", "1.5"), "uncomp.LorcConfig: rho must be a share"),
        (("--rank-k", "80"), "uncomp.LorcConfig: rank_k must be at most the head dim 64; got 80"),
        (("--whiten", "missing.txt"), 'text "missing.txt" cannot be read'),
        (("--samples", "0"), "uncomp lorc: --samples must be at least 1; got 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(source, tmp_path, capsys, words, text):
    status, _, err = run(capsys, "lorc", "--model", source, *words, "--out", tmp_path / "x", "--device", "cpu")
    assert status == 2 and text in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_and_a_compressed_model_are_refused(source, written, tmp_path, capsys):
    status, _, err = run(capsys, "lorc", "--model", source, "--out", source)
    assert status == 2 and "must be new or empty; it holds something" in err
    status, _, err = run(capsys, "lorc", "--model", written[0], "--out", tmp_path / "x", "--device", "cpu")
    assert status == 2 and "is compressed already" in err


def rerank(folder, rank_k, rank_v):
    """Other ranks in a checkpoint's record."""
    path = folder / "uncomp_lorc.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_k": rank_k, "rank_v": rank_v}))


def without(folder, name):
    """One tensor leaves a checkpoint's factors."""
    from safetensors.torch import load_file, save_file

    factors = load_file(folder / "uncomp_lorc.safetensors")
    del factors[name]
    save_file(factors, folder / "uncomp_lorc.safetensors")


def changed(folder, change, name="model.layers.0.self_attn.v_proj.down"):
    """One tensor of a checkpoint's factors becomes another."""
    from safetensors.torch import load_file, save_file

    factors = load_file(folder / "uncomp_lorc.safetensors")
    save_file(factors | {name: change(factors[name])}, folder / "uncomp_lorc.safetensors")


def made_exact(folder):
    """A record that no handle writes: prompts would run on weights that are in no file."""
    record = json.loads((folder / "uncomp_lorc.json").read_text())
    record["config"]["exact_prefill"] = True
    (folder / "uncomp_lorc.json").write_text(json.dumps(record))


def model_without(folder, name):
    """One tensor leaves the model beside the factors."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: (p / "uncomp_lorc.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "uncomp_lorc.json").unlink(), 'uncomp_lorc.json" cannot be read'),
        (lambda p: (p / "uncomp_lorc.json").write_text("[" * 100_000), "cannot be read"),
        (made_exact, "cannot be read .*exact_prefill"),
        (lambda p: changed(p, lambda t: t.fill_(float("nan"))), "v_proj.down must be finite; got NaN"),
        (lambda p: changed(p, torch.Tensor.int), "v_proj.down must be float32, .*; got torch.int32"),
        (lambda p: model_without(p, "model.layers.1.mlp.up_proj.weight"), "must hold model.layers.1.mlp.up_proj"),
        (lambda p: model_without(p, "model.layers.0.self_attn.q_proj.bias"), "must hold model.*q_proj.bias"),
        (lambda p: (p / "uncomp_lorc.json").write_text('{"version": 9}'), "version 9 is not 1"),
        (lambda p: (p / "uncomp_lorc.safetensors").write_bytes(b"x" * 40), "cannot be read"),
        (lambda p: (p / "uncomp_lorc.safetensors").unlink(), "cannot be read"),
        (lambda p: rerank(p, [None, None], [None, None]), "no more; got model.layers.0.self_attn.k_proj.basis"),
        (lambda p: rerank(p, [48, 16], [64, None]), r"cannot be read .*none of both; got \(16, None\)"),
        (lambda p: rerank(p, [48, -16], [64, 32]), r"cannot be read .*multiples of 16, .*; got \(-16, 32\)"),
        (
            lambda p: without(p, "model.layers.1.self_attn.k_proj.bias"),
            "must hold model.layers.1.self_attn.k_proj.bias",
        ),
        (
            lambda p: without(p, "model.layers.1.self_attn.o_proj.bias"),
            "must hold model.layers.1.self_attn.o_proj.bias",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(written, tmp_path, damage, text):
    import shutil

    folder = shutil.copytree(written[0], tmp_path / "copy")
    damage(folder)
    with pytest.raises(ValueError, match=rf"^uncomp\.lorc\.load: .*{text}"):
        lorc.load(folder)


def test_a_checkpoint_of_another_model_is_refused_and_that_is_untouched(written, source):
    model = tiny_model("llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"is of layers \[0, 1\]; the model has \[0, 1, 2\]"):
        lorc.attach(model, written[0])
    wide = tiny_model("qwen2", num_hidden_layers=2, hidden_size=96)
    with pytest.raises(ValueError, match=r"k_proj\.down must be \[192, 96\]; got \[192, 64\]"):
        lorc.attach(wide, written[0])
    assert type(wide.model.layers[0].self_attn.k_proj) is torch.nn.Linear
    with pytest.raises(ValueError, match=r"^uncomp\.lorc\.load: folder .* must hold uncomp_lorc\.json"):
        lorc.load(source)


def test_a_compressed_model_is_saved_by_its_handle_alone(tmp_path):
    model = tiny_model("llama", num_hidden_layers=1)
    handle = lorc.compress(model, lorc.LorcConfig(granularity="layer"))
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(NotImplementedError, match=r"^uncomp\.lorc: model\.save_pretrained .* of the handle"):
            one.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()
    handle.save_pretrained(tmp_path / "small")
    handle.remove()
    model.save_pretrained(tmp_path / "whole")
    again = type(model).from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("out", ["/proc/uncomp", "a" * 300])
def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_read(source, capsys, monkeypatch, out):
    monkeypatch.setattr("uncomp.hf.load.load_model", lambda *args, **kwargs: pytest.fail("the model was read"))
    status, _, err = run(capsys, "lorc", "--model", source, "--out", out)
    assert status == 2 and err.startswith(f'uncomp.lorc: folder "{out}" cannot be written (') and err.count("\n") == 1


def test_a_disk_that_fills_up_leaves_nothing_behind(source, tmp_path, capsys, monkeypatch):
    def full(factors, path):
        path.write_bytes(b"the beginning")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    status, _, err = run(capsys, "lorc", "--model", source, "--rho", "0.5", "--out", tmp_path / "x", "--device", "cpu")
    assert status == 2 and "cannot be written (OSError: [Errno 28] No space left on device)" in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_be_empty_or_a_link_to_an_empty_one(tmp_path):
    model = tiny_model("llama", num_hidden_layers=1)
    handle = lorc.compress(model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    handle.save_pretrained(tmp_path / "link")
    assert lorc.is_checkpoint(tmp_path / "empty") and len(list(tmp_path.iterdir())) == 2
