# SPDX-License-Identifier: Apache-2.0
"""Rows that store nothing: which they are, whose attention they copy, and tensors of the rows that stay.

Takes: a mask of deleted rows, the rotated keys of the prompt. Gives: the rows that stay, and for every row the place
among them whose output it has. Formula: the kept row with the largest cosine between the last keys.
docs/method.md "Deleted heads".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LAST_KEYS = 8  # of the prompt; rows are compared by them


@dataclass(frozen=True)
class KeptRows:
    """The rows of each sequence that store tokens.

    Fields:
        row: [B, K] int64, kept rows, ascending.
        source: [B, H] int64, for every row the place in `row` of itself or, where it is deleted, of its partner.
    """

    row: Tensor
    source: Tensor


def choose(deleted: Tensor, key: Tensor, first: Tensor | None, count: int) -> KeptRows:
    """Rows that stay, and the partner of every deleted one. No host sync.

    Args:
        deleted: [B, H] bool, `count` rows of every sequence.
        key: [B, Hkv, S, D] rotated keys of the prompt, left-padded; Hkv divides H.
        first: [B] int32 first real column, or None where all are real.
        count: deleted rows of a sequence, 0 to H - 1.
    Returns:
        Fixed for the sequence. Ties go to the lower row; a zero vector has cosine 0, NaN is below every cosine.
    Source: docs/method.md "Deleted heads".
    """
    batch, rows = deleted.shape
    row = deleted.int().argsort(dim=1, stable=True)[:, : rows - count]
    last = key[:, :, -LAST_KEYS:].double()
    if first is not None:
        column = torch.arange(key.shape[2] - last.shape[2], key.shape[2], device=key.device)
        last = last.masked_fill((column < first.unsqueeze(1))[:, None, :, None], 0.0)
    flat = last.flatten(2)  # [B, Hkv, 8 D]
    flat = flat / flat.norm(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    repeat = rows // key.shape[1]  # query-head rows of one KV head have the same keys, to the bit
    cosine = (flat @ flat.transpose(1, 2)).nan_to_num(-2.0).repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
    partner = cosine.gather(2, row.unsqueeze(1).expand(batch, rows, -1)).argmax(2)  # the first of equal ones
    own = (~deleted).cumsum(1) - 1
    return KeptRows(row, torch.where(deleted, partner, own))


def narrow(states: Tensor, row: Tensor, rows: int) -> Tensor:
    """Heads of the kept rows.

    Args:
        states: [B, heads, T, D]; rows divide the heads (queries, or keys with a row a KV head), or heads divide the
            rows (keys with a row a query head).
        row: [B, K] int64. rows: H.
    Returns:
        [B, K * max(1, heads / rows), T, D] contiguous, in the order of the rows.
    """
    heads = states.shape[1]
    if heads < rows:
        row, rows = row // (rows // heads), heads
    grouped = states.unflatten(1, (rows, heads // rows))
    index = row[:, :, None, None, None].expand(-1, -1, *grouped.shape[2:])
    return grouped.gather(1, index).flatten(1, 2)


def widen(out: Tensor, kept: KeptRows) -> Tensor:
    """Outputs of all query heads: those of a deleted row are copies of its partner's, in order.

    Args:
        out: [B, K * g, T, Dv] of the query heads of the kept rows.
    Returns:
        [B, H * g, T, Dv] contiguous.
    """
    return narrow(out, kept.source, kept.row.shape[1])
