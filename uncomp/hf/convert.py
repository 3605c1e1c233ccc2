# SPDX-License-Identifier: Apache-2.0
"""Turns a GGUF file, once, into an ordinary bf16 model folder in the user's cache, keyed by its sha256."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from uncomp.hf import compat

log = logging.getLogger(__name__)

# Two copies of one embedding, quantised differently, differ by less than this share of their norm; an output
# matrix of its own differs by more than its whole norm.
SAME_EMBEDDING = 0.2
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}


def cache_dir() -> Path:
    """Where converted models lie: $UNCOMP_CACHE, else uncomp under $XDG_CACHE_HOME or ~/.cache; then models."""
    own = os.environ.get("UNCOMP_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "uncomp"
    return base.expanduser().absolute() / "models"


def _make_cache_dir() -> Path:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f'uncomp.hf.load: cannot make the model cache "{folder}" ({error.strerror}); set UNCOMP_CACHE to a '
            "folder that you can write"
        ) from error
    return folder


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks.

    Raises:
        ValueError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise ValueError(f'uncomp.hf.load: file "{path}" cannot be read ({error.strerror})') from error
    return digest.hexdigest()


def remembered_sha256(path: Path) -> str:
    """sha256 of a file, computed once for each path, size and time of change and then read from the cache."""
    path = path.resolve()
    stat = path.stat()
    key = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    note = cache_dir() / "digests" / key
    if note.is_file() and len(text := note.read_text()) == 64:
        return text
    found = sha256(path)
    _make_cache_dir()
    note.parent.mkdir(exist_ok=True)
    partial = note.with_suffix(f".{os.getpid()}")
    partial.write_text(found)
    partial.replace(note)
    return found


def find_converted(digest: str) -> Path | None:
    """Folder of the file with this sha256 when it has been converted before."""
    folder = cache_dir() / digest
    return folder if folder.is_dir() else None


@contextlib.contextmanager
def _alone(digest: str) -> Iterator[None]:
    """One conversion of a file at a time; the system lets go of the lock when a process dies."""
    with (_make_cache_dir() / f"{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def converted(path: Path, digest: str) -> Path:
    """Folder with the dense model and tokenizer of a GGUF file; converts on the first call.

    Args:
        path: the GGUF file.
        digest: its sha256; names the folder.
    Raises:
        ValueError: not a whole GGUF file, or of a kind that transformers cannot convert.
        ImportError: gguf or accelerate is missing.
    """
    if folder := find_converted(digest):
        return folder
    reader = _read(path)
    with _alone(digest):
        if folder := find_converted(digest):
            return folder
        final, partial = cache_dir() / digest, cache_dir() / f"{digest}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        log.info("uncomp.hf: converting %s once into %s", path, final)
        try:
            _convert(path, reader, partial)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _read(path: Path) -> Any:
    """The parsed header of a GGUF file; every tensor lies inside the file."""
    try:
        import accelerate  # noqa: F401
        import gguf
    except ImportError as error:
        raise ImportError(
            f'uncomp.hf.load: {error.name} is needed to read GGUF file "{path}"; pip install accelerate gguf'
        ) from error
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f'uncomp.hf.load: "{path}" is not a GGUF file: it starts with {magic!r}')
    try:
        return gguf.GGUFReader(path)
    except Exception as error:
        raise ValueError(
            f'uncomp.hf.load: GGUF file "{path}" is cut or corrupt ({first_line(error)}); fetch it again'
        ) from error


def first_line(error: BaseException) -> str:
    """Kind and first line of an exception's text."""
    text = str(error).strip().split("\n")[0].strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _convert(path: Path, reader: Any, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, **source, **compat.gguf_options()
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        found = ".".join(map(str, compat.version()))
        raise ValueError(
            f'uncomp.hf.load: transformers {found} cannot convert GGUF file "{path}" ({first_line(error)})'
        ) from error

    # transformers 5.17 gives wrong special tokens; the ids that the file names are right.
    for name, attribute in _SPECIAL.items():
        if field := reader.fields.get(f"tokenizer.ggml.{name}_token_id"):
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(field.contents())))
    tokenizer.clean_up_tokenization_spaces = False  # 5.17 saves True, which would eat spaces before punctuation

    # The weights are dense by now, but a model that says it is quantised refuses to be written.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _tie(model)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tie(model: torch.nn.Module) -> None:
    """Ties an output matrix that is a second copy of the embedding, as some GGUF files hold it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight or head.weight.shape != embedding.weight.shape:
        return
    if (head.weight - embedding.weight).norm() <= SAME_EMBEDDING * embedding.weight.norm():
        model.config.tie_word_embeddings = True
        head.weight = embedding.weight
        model.tie_weights()
