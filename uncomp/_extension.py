# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled module `_C`, which registers torch.ops.uncomp, or says exactly what is missing."""

from __future__ import annotations

from typing import Any

import torch

try:
    from uncomp import _C
except ImportError as error:
    raise ImportError(
        f"uncomp: the compiled module uncomp._C could not be loaded with torch {torch.__version__} ({error}); "
        "build it against this torch with `pip install --no-build-isolation .`"
    ) from error


def build_info() -> dict[str, Any]:
    """What this build is: version, torch it was built with and torch that runs, CUDA, architectures, head dims.

    `head_dims` are the tiles the kernels are compiled for; every head dim that is a multiple of 8 and not above the
    largest tile works.
    """
    return {**_C.build_info(), "torch_running": torch.__version__}


def limits() -> dict[str, int]:
    """Every limit of csrc/core/constants.h by name."""
    return _C.limits()


def op_names() -> list[str]:
    """Names of all operators, in the order of the method."""
    return _C.op_names()


def _device_index(device: torch.device | str | int | None) -> int | None:
    """Index of a CUDA device; None where torch sees none."""
    if not isinstance(device, int):
        device = torch.device("cuda" if device is None else device)
        if device.type != "cuda":
            raise ValueError(f"uncomp: device must be a CUDA device; got {device}")
    if not torch.cuda.is_available():
        return None
    if isinstance(device, int):
        return device
    return torch.cuda.current_device() if device.index is None else device.index


def warmup(device: torch.device | str | int | None = None) -> None:
    """Does what must happen on a CUDA device before the first graph capture.

    Args:
        device: a CUDA device; default: the current one.
    Raises:
        RuntimeError: torch sees no CUDA device, or this build has no CUDA kernels (NotImplementedError).
        ValueError: `device` is no CUDA device.
    """
    index = _device_index(device)
    if index is None:
        raise RuntimeError(f"uncomp.warmup: needs a CUDA device; torch {torch.__version__} sees none")
    _C.warmup(index)


def raise_device_errors(device: torch.device | str | int | None = None) -> None:
    """Raises the first violation that a kernel noted on the device since the last call; clears it.

    Some violations (an index outside a row, a row without room) depend on device data, so a kernel cannot raise
    them. It leaves the row untouched and notes the fact; this call synchronises and turns it into an exception.
    Where torch sees no CUDA device no kernel can have noted anything, and the call returns.

    Args:
        device: a CUDA device; default: the current one.
    Raises:
        ValueError: names the operator, the argument and what was wanted.
    """
    index = _device_index(device)
    text = "" if index is None else _C.take_device_error(index)
    if text:
        raise ValueError(text)
