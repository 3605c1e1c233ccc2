# SPDX-License-Identifier: Apache-2.0
"""Rivals that need more than a line: signatures that differ by torch version, other libraries, C interfaces."""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import inspect
import os
from collections.abc import Callable

import torch

Run = Callable[[], object]


def varlen_attention(query, key, value, query_start, key_start, longest_query, longest_key):
    """torch.nn.attention.varlen over packed rows; before 2.13 grouped heads need no flag, from then on they do."""
    from torch.nn.attention.varlen import varlen_attn

    flag = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(query, key, value, query_start, key_start, longest_query, longest_key, **flag)


def compiled(make: Callable[[int], Run]) -> Callable[[int], Run]:
    """torch.compile of what `make(i)` returns; kernels alone, because the harness captures the graph itself."""
    return lambda i: torch.compile(make(i), dynamic=False)


def colreduce(query, key, causal=True):
    """flash-colreduce: sums of attention columns of each query head; keys are given a copy for each query head.

    query [B, Hq, W, D], key [B, Hq, S, D] -> [B, Hq, S]. ImportError where the package is not installed.
    """
    from flash_colreduce import flash_colreduce

    return flash_colreduce(query, key, reduction="sum", is_causal=causal)


@functools.cache
def _cusolver() -> ctypes.CDLL:
    """libcusolver of the packages beside torch, or the system's."""
    spec = importlib.util.find_spec("nvidia")
    roots = [*(spec.submodule_search_locations or [])] if spec else []
    found = [path for root in roots for path in glob.glob(os.path.join(root, "**", "libcusolver.so.*"), recursive=True)]
    for name in [*found, "libcusolver.so.12", "libcusolver.so.11", "libcusolver.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError("libcusolver was not found")


class SyevBatched:
    """Eigenvalues of `count` symmetric float32 matrices [count, n, n] by cusolverDnXsyevBatched.

    The matrices are overwritten by the solver, so a call copies them first, as a user would.
    """

    REAL_32 = 0  # CUDA_R_32F
    VALUES, LOWER = 0, 0  # no vectors; triangle

    def __init__(self, matrices: torch.Tensor):
        self.library = _cusolver()
        self.matrices, self.work = matrices, torch.empty_like(matrices)
        self.count, self.n = matrices.shape[0], matrices.shape[-1]
        self.values = torch.empty(self.count, self.n, device=matrices.device)
        self.info = torch.empty(self.count, dtype=torch.int32, device=matrices.device)
        self.handle, self.params = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self.library.cusolverDnCreate(ctypes.byref(self.handle)))
        self._check(self.library.cusolverDnCreateParams(ctypes.byref(self.params)))
        device_bytes, host_bytes = ctypes.c_size_t(), ctypes.c_size_t()
        sizes = (ctypes.byref(device_bytes), ctypes.byref(host_bytes), ctypes.c_int64(self.count))
        self._check(self.library.cusolverDnXsyevBatched_bufferSize(*self._problem(), *sizes))
        self.on_device = torch.empty(device_bytes.value, dtype=torch.uint8, device=matrices.device)
        self.on_host = ctypes.create_string_buffer(max(host_bytes.value, 1))
        self.sizes = device_bytes, host_bytes

    def _problem(self) -> list[object]:
        n, real = ctypes.c_int64(self.n), ctypes.c_int(self.REAL_32)
        pointers = ctypes.c_void_p(self.work.data_ptr()), ctypes.c_void_p(self.values.data_ptr())
        shape = [ctypes.c_int(self.VALUES), ctypes.c_int(self.LOWER), n, real]
        return [self.handle, self.params, *shape, pointers[0], n, real, pointers[1], real]

    @staticmethod
    def _check(status: int) -> None:
        if status != 0:
            raise RuntimeError(f"cuSOLVER answered {status}")

    def __call__(self) -> torch.Tensor:
        """Ascending eigenvalues [count, n]."""
        self.work.copy_(self.matrices)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(self.library.cusolverDnSetStream(self.handle, stream))
        buffers = [ctypes.c_void_p(self.on_device.data_ptr()), self.sizes[0], self.on_host, self.sizes[1]]
        info = ctypes.c_void_p(self.info.data_ptr())
        self._check(self.library.cusolverDnXsyevBatched(*self._problem(), *buffers, info, ctypes.c_int64(self.count)))
        return self.values
