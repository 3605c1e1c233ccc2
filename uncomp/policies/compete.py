# SPDX-License-Identifier: Apache-2.0
"""How many of a layer's best tokens lie in each of its rows: what rows compete with for tokens.

    f_h = tokens of row h among the `wanted` largest pooled scores of the layer

Ties go to the lower row, then to the lower position. Computed on the device; the host knows bounds alone.
docs/policies.md "adakv".
"""

from __future__ import annotations

import torch
from torch import Tensor

from uncomp import ops
from uncomp.budget import MAX_WEIGHT
from uncomp.config import UncompConfig
from uncomp.grouping import int32_on
from uncomp.scoring import pool_scores
from uncomp.types import PlanRequest


def candidates(scores: Tensor, length: Tensor, config: UncompConfig) -> Tensor:
    """Pooled scores of the tokens that are neither window nor sinks.

    Args:
        scores: [R, columns] float32, not pooled. length: [R] int32 live columns.
    Returns:
        [R, columns] float32, NaN where a token is no candidate; a candidate's own NaN is -inf.
    """
    pooled = pool_scores(scores, length, config.pool_width, config.pool, config.window)
    column = torch.arange(pooled.shape[1], device=pooled.device)
    free = (column >= config.sinks) & (column < (length - config.window).unsqueeze(1))
    return torch.where(free, pooled.nan_to_num(float("-inf"), float("inf"), float("-inf")), float("nan"))


def owner(start: Tensor, total: int, count: int) -> Tensor:
    """[total] int64, which of `count` lists each entry of a packed array belongs to; start [count + 1]."""
    entry = torch.arange(total, dtype=start.dtype, device=start.device)
    return torch.searchsorted(start[1:].contiguous(), entry, right=True).clamp(max=max(count - 1, 0))


def hits(scores: Tensor, rows: int, wanted: Tensor, bound: list[int]) -> Tensor:
    """How many of a sequence's `wanted` largest scores lie in each row. No host sync.

    Args:
        scores: [B, rows * columns] from `candidates`. wanted: [B, 1] int64, at most the candidates that there are.
        bound: [B] host numbers, at least `wanted`.
    Returns:
        [B, rows] int64.
    """
    batch, width = scores.shape
    total = sum(min(each, width) for each in bound)
    length = torch.full((batch,), width, dtype=torch.int32, device=scores.device)
    index, start = ops.select_tokens(scores, length, wanted.flatten().to(torch.int32), total, sink=0, window=0)
    row = owner(start, total, batch) * rows + index.clamp(min=0) // max(width // rows, 1)
    found = torch.zeros(batch * rows, dtype=torch.int64, device=scores.device)
    return found.scatter_add_(0, row, (index >= 0).long()).view(batch, rows)


def row_weights(
    request: PlanRequest, group: Tensor, weights: Tensor | list[int], config: UncompConfig, rows: int
) -> Tensor:
    """Weight of every row: that of its group times the row's hits in its own layer. No host sync.

        w_h = s_g(h) f_h        f_h of the H b' best of the layer, b' = b - W - n_s

    A row without a hit weighs as little as a weight can, so its limit is about its lower bound. Where a prompt has no
    token beside window and sinks, rows weigh as their groups do. Products above 2^20 are scaled down together.

    Args:
        request: of one layer, or of several of which each has an equal part of the totals.
        group: [B, N] int32. weights: of the groups, G integers or [B, G] int32.
        rows: rows of a layer, H.
    Returns:
        [B, N] int32 from 1 to 2^20.
    Source: docs/policies.md "uncomp".
    """
    batch = len(request.lengths)
    host = [total // len(request.layers) - rows * config.floor for total in request.totals]  # of one layer
    found = []
    for scores, length in zip(request.scores, request.candidates, strict=True):
        best = candidates(scores, length, config).view(batch, -1)
        have = (length.long().view(batch, rows) - config.floor).clamp(min=0).sum(1, keepdim=True)
        wanted = torch.minimum(int32_on(scores.device, tuple(host)).long().unsqueeze(1), have)
        found.append(hits(best, rows, wanted, host).to(request.device))
    each = torch.cat(found, 1)
    each = each.masked_fill(each.sum(1, keepdim=True) == 0, 1)
    if not isinstance(weights, Tensor):
        weights = int32_on(request.device, tuple(weights))
    product = weights.long().expand(batch, -1).gather(1, group.long()) * each
    scale = (product.amax(1, keepdim=True) - 1) // MAX_WEIGHT + 1
    return (product // scale).clamp(min=1).to(torch.int32)
