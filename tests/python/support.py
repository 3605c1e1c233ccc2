# SPDX-License-Identifier: Apache-2.0
"""Calls that every operator's tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch

import uncomp


def opcheck(name: str, *args, **kwargs) -> None:
    """torch's own checks of schema, fake kernel, autograd registration and compiled dispatch of uncomp::<name>."""
    op = getattr(torch.ops.uncomp, name).default
    torch.library.opcheck(op, args, kwargs)


def capture_graph(step: Callable):
    """Runs `step` once, captures it, and returns (replay, captured result)."""
    uncomp.warmup()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equality of dtype, shape and every bit, NaN payloads included."""
    same = got.dtype == want.dtype and got.shape == want.shape
    return same and torch.equal(got.cpu().contiguous().view(torch.uint8), want.cpu().contiguous().view(torch.uint8))
