# SPDX-License-Identifier: Apache-2.0
"""decode_evict_ as the method states it: one row, tokens in position order, no slots, votes as real numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Row:
    """K stored tokens in position order and the votes of the last Wd queries on them, oldest first."""

    keys: Tensor  # [K, Dk] float64
    values: Tensor  # [K, Dv] float64
    positions: list[int]
    votes: Tensor  # [Wd, K] float64


@dataclass
class Step:
    """What one step gives; `left` is the place of the token that left, `pooled` the score of every candidate."""

    row: Row
    out: Tensor  # [g, Dv]
    lse: Tensor  # [g]
    pooled: list[float]
    left: int | None


def reduce_heads(weights: Tensor, mode: str) -> Tensor:
    """[g, K + 1] to [K + 1]; "sum" is kept as the mean."""
    return weights.amax(0) if mode == "max" else weights.mean(0)


def pool_scores(scores: list[float], width: int, mode: str) -> list[float]:
    half, pooled = width // 2, []
    for i in range(len(scores)):
        near = scores[max(0, i - half) : i + half + 1]
        pooled.append(max(near) if mode == "max" else sum(near) / width)
    return pooled


def step(
    row: Row,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: int,
    limit: int,
    *,
    window: int,
    sink: int,
    pool: int,
    scale: float,
    pool_mode: str = "max",
    reduce_group: str = "mean",
    left: int | None = None,
) -> Step:
    """Section 9, steps 1 to 5. query [g, Dk], key [Dk], value [Dv]. `left` overrides the choice of who leaves."""
    if limit == 0:
        zero = torch.zeros(query.shape[0], value.shape[0], dtype=torch.float64)
        return Step(row, zero, torch.full((query.shape[0],), -math.inf, dtype=torch.float64), [], None)
    keys = torch.cat([row.keys, key.double()[None]])
    values = torch.cat([row.values, value.double()[None]])
    positions = [*row.positions, position]
    logits = scale * query.double() @ keys.T
    weights, lse = torch.softmax(logits, -1), torch.logsumexp(logits, -1)
    out = weights @ values
    a = torch.nan_to_num(reduce_heads(weights, reduce_group), nan=0.0)
    new_column = torch.zeros(row.votes.shape[0], 1, dtype=torch.float64)
    votes = torch.cat([torch.cat([row.votes, new_column], 1), a[None]])[1:]
    pooled: list[float] = []
    if len(row.positions) >= limit:
        candidates = len(positions) - window
        pooled = pool_scores(votes[:, :candidates].sum(0).tolist(), pool, pool_mode)
        if left is None:
            left = min(range(sink, candidates), key=lambda i: (pooled[i], i))
        stay = [i for i in range(len(positions)) if i != left]
        keys, values, votes = keys[stay], values[stay], votes[:, stay]
        positions = [positions[i] for i in stay]
    return Step(Row(keys, values, positions, votes), out, lse, pooled, left)
