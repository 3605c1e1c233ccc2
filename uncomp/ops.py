# SPDX-License-Identifier: Apache-2.0
"""One typed function an operator. The only file that says torch.ops.

Contracts (shapes, dtypes, units, errors, cost, source) are in csrc/ops/<op>.h. Letters: B sequences, Hq query heads,
Hkv KV heads, R = B * rows per sequence, S prompt tokens, W window, D head dim, C slots of an arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uncomp import _fakes  # noqa: F401  registers torch.ops.uncomp and its fake kernels

_ops = torch.ops.uncomp


# ---- matrix_spectrum
def matrix_spectrum(states: Tensor, top: int, *, first: Tensor | None = None, length: Tensor | None = None) -> Tensor:
    """Largest eigenvalues of the trace-one token covariance of every head, descending.

    Args:
        states: [B, H, S, D] queries, keys, values or hidden states; any strides with D contiguous.
        top: eigenvalues wanted, 1 to D.
        first: [B] int32, first real token; default 0.
        length: [B] int32, real tokens; default all that follow `first`.
    Returns:
        [B, H, top] float32 (float64 for float64 states), shares of the trace.
    Source: docs/method.md "Entropy".
    """
    return _ops.matrix_spectrum(states, first, length, top)


# ---- matrix_entropy
def matrix_entropy(spectrum: Tensor, top: int, dim: int, *, kind: str = "truncated") -> tuple[Tensor, Tensor]:
    """Truncated matrix entropy and effective rank of spectra.

    Args:
        spectrum: [..., N] float32 or float64, eigenvalues descending, shares of the trace; N >= top.
        top: eigenvalues k that enter.
        dim: D of the states; the divisor is ln D for every k.
        kind: "truncated", "renormalized" (the k shares are divided by their sum) or "renyi2" (needs all D).
    Returns:
        entropy [...] = H_k / ln D and erank [...] = exp(H_k).
    Source: docs/method.md "Entropy".
    """
    return _ops.matrix_entropy(spectrum, top, dim, kind)


# ---- group_heads
def group_heads(entropy: Tensor, num_groups: int, *, order: str = "ascending") -> tuple[Tensor, Tensor]:
    """Ranks rows by entropy (ties to the lower row, NaN last) and cuts the ranking into groups.

    Args:
        entropy: [N, H] float32, one ranking per N.
        num_groups: 1 to H.
        order: "ascending" (group 0 = lowest entropy) or "reverse" (group ids turned round).
    Returns:
        group [N, H] int32 and rank [N, H] int32.
    Source: docs/method.md "Grouping".
    """
    return _ops.group_heads(entropy, num_groups, order)


# ---- allocate_budget
def allocate_budget(group: Tensor, weight: Tensor, length: Tensor, total: Tensor, floor: int) -> Tensor:
    """Token limit of every row; the limits of a sequence sum to its total exactly.

    Args:
        group: [N, H] int32 group of each row.
        weight: [G] or [N, G] int32, positive weight of each group.
        length: [N] int32 tokens of the sequence that reach the layer.
        total: [N] int32 tokens that the rows of the sequence share.
        floor: tokens that every row keeps in any case (window and sinks).
    Returns:
        [N, H] int32 limits.
    Source: docs/method.md "Budget".
    """
    return _ops.allocate_budget(group, weight, length, total, floor)


# ---- window_scores
def window_scores(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    value: Tensor | None = None,
    first: Tensor | None = None,
    length: Tensor | None = None,
    row_start: Tensor | None = None,
    row_len: Tensor | None = None,
    columns: int = 0,
    reduce_window: str = "sum",
    reduce_group: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Attention mass that the last W queries put on every key, reduced over the window and the query group.

    Args:
        query: [B, Hq, W, D] the last W queries, rotated.
        key: [B, Hkv, S, D] dense keys, or [C, D] an arena whose rows lie in position order.
        scale: factor of the logits.
        value: same layout as key; multiplies each score by the norm of the token's value.
        first, length: [B] int32, real tokens of a dense prompt.
        row_start, row_len: [R + 1] and [R] int32, rows of an arena.
        columns: width of the result for an arena; rows longer than that are cut.
        reduce_window: "sum" or "mean".
        reduce_group: "mean", "sum", "max", or "none" for one row per query head.
    Returns:
        scores [R, S or columns] float32, columns counted from `first`, 0 behind the last token; lse [B, Hq, W].
    Source: docs/method.md "Scoring".
    """
    return _ops.window_scores(
        query, key, value, first, length, row_start, row_len, columns, scale, reduce_window, reduce_group
    )


# ---- seed_votes_
def seed_votes_(
    query: Tensor,
    lse: Tensor,
    query_position: Tensor,
    key_rows: Tensor,
    slot_position: Tensor,
    row_start: Tensor,
    row_len: Tensor,
    votes: Tensor,
    vote_sum: Tensor,
    vote_step: Tensor,
    order: Tensor,
    scale: float,
    *,
    reduce_group: str = "mean",
) -> None:
    """Fills the vote state of a freshly packed arena from the last Wd prompt queries.

    Args:
        query: [B, Hq, W, D] the last W queries; the newest Wd of them vote.
        lse: [B, Hq, W] float32 of window_scores.
        query_position: [B, W] int32 original positions; -1 where a query does not exist.
        key_rows: [C, D] arena. slot_position: [C] int32. row_start: [R + 1], row_len: [R] int32.
        votes: [Wd, C] int32, vote_sum: [C] int32, vote_step: [R] int32, order: [C] int32; overwritten.
        scale: factor of the logits.
        reduce_group: "mean", "sum" (stored as the mean) or "max".
    Source: docs/method.md "Decode".
    """
    _ops.seed_votes_(
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
        reduce_group,
    )


# ---- select_tokens
def select_tokens(
    scores: Tensor,
    length: Tensor,
    keep_len: Tensor,
    total_keep: int,
    *,
    sink: int,
    window: int,
    pool: int = 1,
    pool_mode: str = "max",
) -> tuple[Tensor, Tensor]:
    """Chooses, for every row, the tokens that stay: sinks, window, and the best pooled scores.

    Args:
        scores: [R, S] float32, larger means keep; NaN is the smallest.
        length: [R] int32 tokens of the row, columns 0 .. length - 1.
        keep_len: [R] int32 tokens to keep, clamped to [min(sink + window, n), n].
        total_keep: sum of the clamped keep_len; sizes the result.
        sink, window: first and last tokens that stay in any case.
        pool, pool_mode: odd width, "max" or "avg"; pooling runs over the tokens before the window.
    Returns:
        index [total_keep] int32, ascending inside a row, and row_start [R + 1] int32.
    Source: docs/method.md "Selection".
    """
    return _ops.select_tokens(scores, length, keep_len, total_keep, sink, window, pool, pool_mode)


# ---- compact_kv
def compact_kv(
    key: Tensor,
    value: Tensor,
    index: Tensor,
    index_start: Tensor,
    row_start: Tensor,
    capacity: int,
    *,
    position: Tensor | None = None,
    first: Tensor | None = None,
    source_start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packs chosen tokens of dense K and V, or of another arena, into the rows of a new arena.

    Args:
        key, value: [B, Hkv, S, D] dense, any strides with D contiguous, or [C0, D] arenas.
        index: [total] int32 tokens of each row, counted from `first` (dense) or from the row's start (arena).
        index_start: [R + 1] int32, where each row's entries begin.
        row_start: [R + 1] int32 slots of the new arena; a row may have more room than tokens.
        capacity: slots C of the new arena.
        position: [B, S] int32 original positions of a dense prompt (default: columns counted from `first`), or
            [C0] slot positions of an arena.
        first: [B] int32, first real token of a dense prompt.
        source_start: [R + 1] int32 slots of the old arena; given exactly when key is an arena.
    Returns:
        key_rows [C, Dk], value_rows [C, Dv], slot_position [C] int32, row_len [R] int32.
    Source: docs/method.md "Selection".
    """
    return _ops.compact_kv(key, value, position, first, source_start, index, index_start, row_start, capacity)


# ---- append_kv_
def append_kv_(
    key: Tensor,
    value: Tensor,
    position: Tensor,
    row_start: Tensor,
    row_len: Tensor,
    key_rows: Tensor,
    value_rows: Tensor,
    slot_position: Tensor,
    *,
    first: Tensor | None = None,
    length: Tensor | None = None,
) -> None:
    """Writes new tokens into the free slots behind every row and advances row_len.

    Args:
        key, value: [B, Hkv, T, D] new tokens, rotated.
        position: [B, T] int32 original positions.
        row_start: [R + 1] int32. row_len: [R] int32, advanced.
        key_rows: [C, Dk], value_rows: [C, Dv], slot_position: [C] int32; written.
        first, length: [B] int32, the real tokens among T.
    Source: docs/method.md "Decode".
    """
    _ops.append_kv_(key, value, position, first, length, row_start, row_len, key_rows, value_rows, slot_position)


@dataclass(frozen=True)
class KeyTransform:
    """How keys are made of stored latents of r numbers: rotate(norm(latent @ basis + bias)), D channels.

    Args:
        basis: [Hkv, r, D], dtype of the query, contiguous. Row r of a sequence has KV head r // (rows // Hkv).
        bias: [Hkv, D] float32.
        norm: [D] float32, weight of an RMS norm of a head's key: key * norm / sqrt(mean(key^2) + norm_eps).
        frequency: [rot / 2] float32, radians a token, rot <= D: channel i turns with channel i + rot / 2; channels from
            rot on stay. Angles stay exact at any position: wrong by at most 1e-9 radians a token.
        rotary_scale: factor of cos and sin.
        offset: [B] int32, added to the stored positions of a sequence.
    """

    basis: Tensor
    bias: Tensor | None = None
    norm: Tensor | None = None
    norm_eps: float = 1e-6
    frequency: Tensor | None = None
    rotary_scale: float = 1.0
    offset: Tensor | None = None


# ---- decode_attention
def decode_attention(
    query: Tensor,
    key_rows: Tensor,
    value_rows: Tensor,
    row_start: Tensor,
    row_len: Tensor,
    scale: float,
    *,
    key_transform: KeyTransform | None = None,
    slot_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query token over the live slots of its rows.

    Args:
        query: [B, Hq, 1, Dk], rotated.
        key_rows: [C, Dk], value_rows: [C, Dv]. row_start: [R + 1], row_len: [R] int32.
        scale: factor of the logits.
        key_transform: key_rows holds latents [C, r]; a key is made when it is attended to, tile by tile.
        slot_position: [C] int32, read where the transform rotates.
    Returns:
        out [B, Hq, 1, Dv] and lse [B, Hq] float32, natural log; an empty row gives 0 and -inf.
    Source: docs/method.md "Decode".
    """
    if key_transform is None:
        return _ops.decode_attention(query, key_rows, value_rows, row_start, row_len, scale)
    k = key_transform
    return _ops.decode_attention(
        query,
        key_rows,
        value_rows,
        row_start,
        row_len,
        scale,
        k.basis,
        k.bias,
        k.norm,
        k.norm_eps,
        k.frequency,
        k.rotary_scale,
        slot_position,
        k.offset,
    )


# ---- decode_evict_
def decode_evict_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    row_start: Tensor,
    row_len: Tensor,
    key_rows: Tensor,
    value_rows: Tensor,
    slot_position: Tensor,
    votes: Tensor,
    vote_sum: Tensor,
    vote_step: Tensor,
    order: Tensor,
    *,
    window: int,
    sink: int,
    pool: int,
    scale: float,
    pool_mode: str = "max",
    reduce_group: str = "mean",
    key_transform: KeyTransform | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of a constant-length cache: attend over row and new token, vote, give up one slot, overwrite it.

    Args:
        query: [B, Hq, 1, Dk]. key: [B, Hkv, 1, Dk]. value: [B, Hkv, 1, Dv]. position: [B] int32.
        row_start: [R + 1] int32; a row's room is its limit. All that follows is changed in place:
        row_len: [R] int32; key_rows, value_rows: [C, D]; slot_position: [C] int32;
        votes: [Wd, C] int32; vote_sum: [C] int32; vote_step: [R] int32, taken modulo Wd; order: [C] int32.
        window: newest tokens that stay. sink: first tokens that stay. pool, pool_mode: as in select_tokens.
        scale: factor of the logits. reduce_group: "mean", "sum" or "max" over the query group's weights.
        key_transform: key and key_rows are latents of r numbers; `key` is stored as such, and attended to as the key at
            its position.
    Returns:
        out [B, Hq, 1, Dv] and lse [B, Hq] float32 over row and new token; a row without room gives 0 and -inf.
    Source: docs/method.md "Decode".
    """
    k = key_transform
    made = () if k is None else (k.basis, k.bias, k.norm, k.norm_eps, k.frequency, k.rotary_scale, k.offset)
    return _ops.decode_evict_(
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
        pool_mode,
        reduce_group,
        *made,
    )


# ---- ragged_attention
def ragged_attention(
    query: Tensor,
    key_rows: Tensor,
    value_rows: Tensor,
    row_start: Tensor,
    row_len: Tensor,
    scale: float,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    other_out: Tensor | None = None,
    other_lse: Tensor | None = None,
    first: Tensor | None = None,
    length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of several new query tokens over all live slots and, causally, over the new tokens.

    Args:
        query: [B, Hq, T, Dk].
        key_rows: [C, Dk], value_rows: [C, Dv]. row_start: [R + 1], row_len: [R] int32: the past.
        scale: factor of the logits.
        key, value: [B, Hkv, T, D] the new tokens, attended causally; or
        other_out, other_lse: [B, Hq, T, Dv] and [B, Hq, T] float32, their attention computed elsewhere; or neither.
        first, length: [B] int32, the real tokens among T; the others give 0 and -inf.
    Returns:
        out [B, Hq, T, Dv] and lse [B, Hq, T] float32.
    Source: docs/method.md "Decode", further tokens.
    """
    return _ops.ragged_attention(
        query, key, value, other_out, other_lse, first, length, key_rows, value_rows, row_start, row_len, scale
    )


# ---- gather_tokens
def gather_tokens(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Gathers the tokens of several tensors by one index, in one launch.

    Args:
        tensors: 1 to 8 tensors [B or 1, S, ...] of any dtypes, contiguous behind the token dimension.
        index: [B, N] int32; -1 gives a token of zeros.
    Returns:
        one contiguous tensor [B, N, ...] per input.
    Source: docs/method.md "Hidden-state pruning".
    """
    return _ops.gather_tokens(tensors, index)
