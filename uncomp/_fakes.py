# SPDX-License-Identifier: Apache-2.0
"""Fake kernels: what torch.compile and `meta` tensors see of an operator.

torch also takes these for a call that mixes real tensors with one on `meta`, so they check devices as the bodies in
csrc/ops do; otherwise such a call would hand back memory that nobody wrote.
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


def _check_count(op: str, name: str, count: int | torch.SymInt) -> None:
    if isinstance(count, int) and count < 0:
        raise ValueError(f"uncomp::{op}: {name} must not be negative; got {count}")


def _say(*dtypes: torch.dtype) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


@fake("matrix_spectrum", states="float+64 [B, H, S, D]", first="int32 [B]", length="int32 [B]")
def _(states, first, length, top):
    dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
    return states.new_empty((states.shape[0], states.shape[1], top), dtype=dtype)


@fake("matrix_entropy", spectrum="float32/64 [..., N]")
def _(spectrum, top, dim, kind="truncated"):
    return spectrum.new_empty(spectrum.shape[:-1]), spectrum.new_empty(spectrum.shape[:-1])


@fake("group_heads", entropy="float32 [N, H]")
def _(entropy, num_groups, order="ascending"):
    return entropy.new_empty(entropy.shape, dtype=torch.int32), entropy.new_empty(entropy.shape, dtype=torch.int32)


@fake("allocate_budget", group="int32 [N, H]", weight="int32 [G] or [N, G]", length="int32 [N]", total="int32 [N]")
def _(group, weight, length, total, floor):
    return torch.empty_like(group)


@fake(
    "window_scores",
    query="float [B, Hq, W, D]",
    key="query [B, Hkv, S, D] or [C, D]",
    value="query [B, Hkv, S, D] or [C, D]",
    first="int32 [B]",
    length="int32 [B]",
    row_start="int32 [R + 1]",
    row_len="int32 [R]",
)
def _(
    query,
    key,
    value,
    first,
    length,
    row_start,
    row_len,
    columns,
    scale,
    reduce_window="sum",
    reduce_group="mean",
):
    batch, num_q_heads, window, _ = query.shape
    dense = row_len is None
    if key.dim() != (4 if dense else 2):
        shape = "[B, Hkv, S, D] where row_len is not given" if dense else "[C, D] where row_len is given"
        raise ValueError(f"uncomp::window_scores: key must have shape {shape}; got {list(key.shape)}")
    rows_of_key = batch * key.shape[1] if dense else row_len.shape[0]
    rows = batch * num_q_heads if reduce_group == "none" else rows_of_key
    scores = query.new_empty((rows, key.shape[2] if dense else columns), dtype=torch.float32)
    return scores, query.new_empty((batch, num_q_heads, window), dtype=torch.float32)


@fake(
    "seed_votes_",
    query="float [B, Hq, W, D]",
    lse="float32 [B, Hq, W]",
    query_position="int32 [B, W]",
    key_rows="query [C, D]",
    slot_position="int32 [C]",
    row_start="int32 [R + 1]",
    row_len="int32 [R]",
    votes="int32 [Wd, C]",
    vote_sum="int32 [C]",
    vote_step="int32 [R]",
    order="int32 [C]",
)
def _(
    query,
    lse,
    query_position,
    key_rows,
    slot_position,
    row_start,
    row_len,
    votes,
    vote_sum,
    vote_step,
    order,
    scale,
    reduce_group="mean",
):
    return None


@fake("select_tokens", scores="float32 [R, S]", length="int32 [R]", keep_len="int32 [R]")
def _(scores, length, keep_len, total_keep, sink, window, pool, pool_mode="max"):
    _check_count("select_tokens", "total_keep", total_keep)
    return (
        scores.new_empty((total_keep,), dtype=torch.int32),
        scores.new_empty((scores.shape[0] + 1,), dtype=torch.int32),
    )


@fake(
    "compact_kv",
    key="float [B, Hkv, S, D] or [C0, D]",
    value="key [B, Hkv, S, D] or [C0, D]",
    position="int32 [B, S] or [C0]",
    first="int32 [B]",
    source_start="int32 [R + 1]",
    index="int32 [total]",
    index_start="int32 [R + 1]",
    row_start="int32 [R + 1]",
)
def _(key, value, position, first, source_start, index, index_start, row_start, capacity):
    _check_count("compact_kv", "capacity", capacity)
    return (
        key.new_empty((capacity, key.shape[-1])),
        value.new_empty((capacity, value.shape[-1])),
        index.new_empty((capacity,)),
        index.new_empty((row_start.shape[0] - 1,)),
    )


@fake(
    "append_kv_",
    key="float [B, Hkv, T, D]",
    value="key [B, Hkv, T, D]",
    position="int32 [B, T]",
    first="int32 [B]",
    length="int32 [B]",
    row_start="int32 [R + 1]",
    row_len="int32 [R]",
    key_rows="key [C, D]",
    value_rows="key [C, D]",
    slot_position="int32 [C]",
)
def _(key, value, position, first, length, row_start, row_len, key_rows, value_rows, slot_position):
    return None


@fake(
    "decode_attention",
    query="float [B, Hq, 1, Dk]",
    key_rows="query [C, Dk]",
    value_rows="query [C, Dv]",
    row_start="int32 [R + 1]",
    row_len="int32 [R]",
    key_basis="query [Hkv, r, D]",
    key_bias="float32 [Hkv, D]",
    key_norm="float32 [D]",
    rotary_frequency="float32 [rot / 2]",
    slot_position="int32 [C]",
    position_offset="int32 [B]",
)
def _(
    query,
    key_rows,
    value_rows,
    row_start,
    row_len,
    scale,
    key_basis=None,
    key_bias=None,
    key_norm=None,
    key_norm_eps=0.0,
    rotary_frequency=None,
    rotary_scale=1.0,
    slot_position=None,
    position_offset=None,
):
    batch, heads = query.shape[:2]
    return (
        query.new_empty((batch, heads, 1, value_rows.shape[1])),
        query.new_empty((batch, heads), dtype=torch.float32),
    )


@fake(
    "decode_evict_",
    query="float [B, Hq, 1, Dk]",
    key="query [B, Hkv, 1, Dk]",
    value="query [B, Hkv, 1, Dv]",
    position="int32 [B]",
    row_start="int32 [R + 1]",
    row_len="int32 [R]",
    key_rows="query [C, Dk]",
    value_rows="query [C, Dv]",
    slot_position="int32 [C]",
    votes="int32 [Wd, C]",
    vote_sum="int32 [C]",
    vote_step="int32 [R]",
    order="int32 [C]",
    key_basis="query [Hkv, r, D]",
    key_bias="float32 [Hkv, D]",
    key_norm="float32 [D]",
    rotary_frequency="float32 [rot / 2]",
    position_offset="int32 [B]",
)
def _(
    query,
    key,
    value,
    position,
    row_start,
    row_len,
    key_rows,
    value_rows,
    slot_position,
    votes,
    vote_sum,
    vote_step,
    order,
    window,
    sink,
    pool,
    scale,
    pool_mode="max",
    reduce_group="mean",
    key_basis=None,
    key_bias=None,
    key_norm=None,
    key_norm_eps=0.0,
    rotary_frequency=None,
    rotary_scale=1.0,
    position_offset=None,
):
    batch, heads = query.shape[:2]
    return (
        query.new_empty((batch, heads, 1, value.shape[3])),
        query.new_empty((batch, heads), dtype=torch.float32),
    )


@fake(
    "ragged_attention",
    query="float [B, Hq, T, Dk]",
    key="query [B, Hkv, T, Dk]",
    value="query [B, Hkv, T, Dv]",
    other_out="query [B, Hq, T, Dv]",
    other_lse="float32 [B, Hq, T]",
    first="int32 [B]",
    length="int32 [B]",
    key_rows="query [C, Dk]",
    value_rows="query [C, Dv]",
    row_start="int32 [R + 1]",
    row_len="int32 [R]",
)
def _(query, key, value, other_out, other_lse, first, length, key_rows, value_rows, row_start, row_len, scale):
    batch, heads, tokens = query.shape[:3]
    return (
        query.new_empty((batch, heads, tokens, value_rows.shape[1])),
        query.new_empty((batch, heads, tokens), dtype=torch.float32),
    )


@fake("gather_tokens", tensors="any [B or 1, S, ...]", index="int32 [B, N]")
def _(tensors, index):
    return [t.new_empty((index.shape[0], index.shape[1], *t.shape[2:])) for t in tensors]
