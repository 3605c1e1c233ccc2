# SPDX-License-Identifier: Apache-2.0
"""Fake kernels, one an operator: what torch.compile and `meta` tensors see of it."""

from __future__ import annotations

import torch

from uncomp._fake_checks import check_count, fake


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
    check_count("select_tokens", "total_keep", total_keep)
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
    check_count("compact_kv", "capacity", capacity)
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
