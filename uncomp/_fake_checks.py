# SPDX-License-Identifier: Apache-2.0
"""Registers fake kernels behind checks of devices, dtypes and ranks.

torch also takes fake kernels for a call that mixes real tensors with one on `meta`, so they check devices as the bodies
in csrc/ops do; otherwise such a call would hand back memory that nobody wrote.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.library import register_fake

from uncomp import _extension  # noqa: F401  registers torch.ops.uncomp

KERNELS: dict[str, tuple[Callable, dict[str, str]]] = {}  # operator -> its fake kernel and what `fake` was told

_DTYPES = {
    "int32": (torch.int32,),
    "float32": (torch.float32,),
    "float32/64": (torch.float32, torch.float64),
    "float": (torch.float32, torch.float16, torch.bfloat16),
    "float+64": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
}


def fake(op: str, **wanted: str) -> Callable:
    """Registers a function as the fake kernel of uncomp::<op>, behind checks of its tensors.

    Its parameters carry the names of the schema. All tensors must be on one device. `wanted` gives the dtype of a
    tensor, as in _DTYPES or by the name of the argument that it follows or "any", and its shape; with "..." in a shape
    its rank is a minimum. Only what never depends on a size is checked, so that sizes may be symbols.
    """

    def register(kernel: Callable) -> Callable:
        signature = inspect.signature(kernel)

        @register_fake(f"uncomp::{op}")
        @functools.wraps(kernel)
        def checked(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            _check_devices(op, given)
            for name, text in wanted.items():
                dtype, shape = text.split(" ", 1)
                for label, tensor in _tensors(name, given.get(name)):
                    _check_dtype(op, label, tensor, dtype, given)
                    _check_rank(op, label, tensor, shape)
            return kernel(*args, **kwargs)

        KERNELS[op] = (kernel, wanted)
        return checked

    return register


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)


def _check_devices(op: str, given: dict[str, object]) -> None:
    tensors = [pair for name, value in given.items() for pair in _tensors(name, value)]
    # A real tensor is the measure: the stray one is on meta.
    ref_name, ref = next((pair for pair in tensors if not pair[1].is_meta), tensors[0])
    for name, t in tensors:
        if t.device != ref.device:
            raise ValueError(f"uncomp::{op}: {name} must be on {ref.device} where {ref_name} is; got {t.device}")


def _check_dtype(op: str, name: str, t: Tensor, dtype: str, given: dict[str, object]) -> None:
    if dtype == "any":
        return
    if dtype not in _DTYPES:
        if t.dtype != given[dtype].dtype:
            raise TypeError(
                f"uncomp::{op}: {name} must have the dtype of {dtype} ({_say(given[dtype].dtype)}); got {_say(t.dtype)}"
            )
    elif t.dtype not in _DTYPES[dtype]:
        raise TypeError(f"uncomp::{op}: {name} must be {_say(*_DTYPES[dtype])}; got {_say(t.dtype)}")


def _check_rank(op: str, name: str, t: Tensor, shape: str) -> None:
    fits = False
    for one in shape.split("] or ["):
        rank = one.count(",") + 1
        fits |= t.dim() >= rank - 1 if "..." in one else t.dim() == rank
    if not fits:
        raise ValueError(f"uncomp::{op}: {name} must have shape {shape}; got {list(t.shape)}")


def check_count(op: str, name: str, count: int | torch.SymInt) -> None:
    if isinstance(count, int) and count < 0:
        raise ValueError(f"uncomp::{op}: {name} must not be negative; got {count}")


def _say(*dtypes: torch.dtype) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
