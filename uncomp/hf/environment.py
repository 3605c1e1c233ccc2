# SPDX-License-Identifier: Apache-2.0
"""What a program finds around it: releases, GPUs, supported models; and how loud transformers is."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

import torch

from uncomp._extension import build_info
from uncomp.hf import compat
from uncomp.hf.load import KNOWN
from uncomp.models import FAMILIES


def environment() -> dict[str, Any]:
    """Facts as plain JSON values; transformers is not imported.

    Returns:
        transformers (installed release or None), transformers_supported, gpus (names), model_types, models (short
        names that load without the network, "(not installed)" beside those whose package is missing).
    """
    return {
        "transformers": _release("transformers"),
        "transformers_supported": compat.RANGE.removeprefix("transformers"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "model_types": [name for family in FAMILIES for name in family.model_types],
        "models": [name + ("" if _release(k.distribution) else " (not installed)") for name, k in KNOWN.items()],
    }


def best_device(wanted: str | None) -> str:
    """The device that a command runs on.

    Args:
        wanted: as torch names it; None: a GPU where there is one and the kernels for it were built.
    Raises:
        ValueError: a GPU without kernels.
    """
    built = build_info()["cuda"]
    if wanted is None:
        return "cuda" if built and torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and torch.cuda.is_available() and not built:
        raise ValueError(f"uncomp: --device {wanted} needs a build with CUDA kernels; this one has none")
    return wanted


def best_dtype(dtype: str, device: str) -> str:
    """What "auto" should mean on a device.

    Half precision on a CPU without instructions for it is tens of times slower than float32.

    Args:
        dtype: a dtype's name, or "auto". device: as torch names it.
    Returns:
        `dtype`, or "float32" for "auto" on such a CPU.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "float32" if dtype == "auto" and device.split(":")[0] == "cpu" and not native else dtype


def quiet(silent: bool = True) -> None:
    """Keeps transformers to its errors; with `silent` no progress bars either. For the whole process."""
    if silent:
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it on import
    compat.version()
    from transformers.utils import logging

    logging.set_verbosity_error()
    if silent:
        logging.disable_progress_bar()


def _release(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
