# SPDX-License-Identifier: Apache-2.0
"""Calls that several test files share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import uncomp


def opcheck(name: str, *args) -> None:
    """torch's own checks of schema, fake kernel, autograd registration and compiled dispatch of uncomp::<name>, and
    ours of what its fake kernel refuses and of version counters."""
    op = getattr(torch.ops.uncomp, name).default
    torch.library.opcheck(op, args)
    fake_kernel_refuses(op, args)
    versions_follow_writes(op, args)


def assert_same_bits_for_threads(call: Callable[[], tuple]) -> None:
    """Results of a CPU call for one thread, for several, and once more."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = call()
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for a, b in zip(call(), want, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), threads  # NaN is not equal to itself
    finally:
        torch.set_num_threads(before)


def versions_follow_writes(op, args: tuple) -> None:
    """A call counts one version on what the schema says it writes, none elsewhere; inference tensors have none."""
    names = [argument.name for argument in op._schema.arguments]
    written = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert bool(written) == op._schema.name.endswith("_")
    for mode in (torch.no_grad, torch.inference_mode):
        call = tree_map_only(torch.Tensor, torch.clone, args)
        with mode():
            op(*call)
        counted = {n for n, t in zip(names, call, strict=False) if isinstance(t, torch.Tensor) and t._version == 1}
        assert counted == written
    with torch.inference_mode():
        call = tree_map_only(torch.Tensor, torch.clone, args)
    op(*call)


def fake_kernel_refuses(op, args: tuple) -> None:
    """The call on `meta` works; with one tensor left there, or of another dtype or rank, it names that tensor."""
    on_meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
    op(*on_meta)
    stray = (args, lambda t: t.to("meta"), ValueError, "must be on .* where .* is; got meta", ())
    dtype = (on_meta, lambda t: t.to(torch.complex64), TypeError, "must .*; got complex64", ("tensors",))
    rank = (on_meta, lambda t: t[(None,) * 5], ValueError, r"must have shape .*; got \[1, 1", ("tensors", "spectrum"))
    alone = sum(isinstance(value, torch.Tensor) for value in tree_leaves(args)) == 1  # one tensor cannot stray
    for call, change, kind, text, free in (dtype, rank) if alone else (stray, dtype, rank):
        for i, argument in enumerate(op._schema.arguments[: len(call)]):
            for place, value in each_tensor_changed(call[i], change):
                if argument.name not in free:
                    name = re.escape(argument.name + place)
                    with pytest.raises(kind, match=f"^{op._schema.name}: {name} {text}"):
                        op(*call[:i], value, *call[i + 1 :])


def each_tensor_changed(value, change: Callable):
    """For each tensor of an argument: its place in the argument, and the argument with it changed."""
    if isinstance(value, torch.Tensor):
        yield "", change(value)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            for place, one in each_tensor_changed(item, change):
                yield f"[{i}]{place}", [*value[:i], one, *value[i + 1 :]]


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


def shared_data(name: str) -> Path:
    """A file or folder of shared/data, beside the repository or above it; skips the test where it is not at hand.

    No part of the project.
    """
    for folder in Path(__file__).resolve().parents:
        path = folder / "shared/data" / name
        if path.exists():
            return path
    pytest.skip(f"shared/data/{name} is not on this machine")


def published_folder() -> Path:
    """Folder of what the paper's authors published of their head groups; skips the test where it is not at hand."""
    return shared_data("uncomp_head_groups")


def published_votes(name: str) -> list[list[list[int]]]:
    """votes[layer][head][label] of one published file; skips the test where the data are not at hand."""
    return json.loads((published_folder() / "votes" / f"{name}.json").read_text())["votes"]
