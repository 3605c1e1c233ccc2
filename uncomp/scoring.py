# SPDX-License-Identifier: Apache-2.0
"""Takes scores [R, columns] and the number of tokens of each row.

Gives pooled scores, NaN where no candidate stands, and numbers that look random but hang on nothing except a counter.
Formula: max or mean over the neighbours j - P/2 .. j + P/2 among the tokens before the window.
docs/method.md "Selection".
"""

from __future__ import annotations

import torch
from torch import Tensor

from uncomp import ops


def pool_scores(scores: Tensor, length: Tensor, width: int, mode: str = "max", exclude_last: int = 0) -> Tensor:
    """Pools as ops.select_tokens does, for policies that must compare pooled scores themselves.

    Args:
        scores: [R, columns] float32.
        length: [R] int32 tokens of each row, at most `columns`.
        width: odd pool width P; 1 pools nothing.
        mode: "max": columns outside are ignored, NaN counts only where all of the neighbours are NaN; "avg": columns
            outside count 0, the divisor is P, NaN spreads; sums run upwards in fp32.
        exclude_last: newest tokens of a row that neither pool nor are pooled (the window).
    Returns:
        [R, columns] float32; NaN from column length - exclude_last on.
    Raises:
        ValueError: an even width, or an unknown mode.
    Source: docs/method.md "Selection".
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"uncomp.scoring: width must be odd and at least 1; got {width}")
    if mode not in ("max", "avg"):
        raise ValueError(f"uncomp.scoring: mode must be one of 'max', 'avg'; got {mode!r}")
    columns = scores.shape[1]
    column = torch.arange(columns, device=scores.device)
    inside = column < (length - exclude_last).unsqueeze(1)
    nothing = float("nan") if mode == "max" else 0.0
    padded = torch.nn.functional.pad(scores.masked_fill(~inside, nothing), (width // 2, width // 2), value=nothing)
    total = padded[:, :columns].clone()
    for shift in range(1, width):
        near = padded[:, shift : shift + columns]
        total = torch.fmax(total, near) if mode == "max" else total.add_(near)
    if mode == "avg":
        total /= width
    return total.masked_fill_(~inside, float("nan"))


def head_scores(
    query: Tensor, key_rows: Tensor, scale: float, row_start: Tensor, row_len: Tensor, columns: int
) -> tuple[Tensor, Tensor]:
    """Attention mass of the last queries on an arena's tokens, one row per query head although heads share keys.

    Args:
        query: [B, Hq, W, D]. key_rows, scale, row_start, row_len, columns: as ops.window_scores.
    Returns:
        [B * Hq, columns] float32, and lse [B, Hq, W]. Keys are read Hq / rows times.
    """
    batch, heads = query.shape[:2]
    group = batch * heads // row_len.shape[0]
    parts = [
        ops.window_scores(
            query[:, head::group],
            key_rows,
            scale,
            row_start=row_start,
            row_len=row_len,
            columns=columns,
            reduce_group="none",
        )
        for head in range(group)
    ]
    scores, lse = torch.stack([p[0] for p in parts], 1), torch.stack([p[1] for p in parts], 2)
    return scores.view(batch * heads, columns), lse.view(batch, heads, -1)


def _mixed(x: Tensor) -> Tensor:
    """One bijection of 64-bit integers that spreads every bit over all others (the finaliser of splitmix64)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform_numbers(seed: int, layer: int, row: Tensor, position: Tensor) -> Tensor:
    """Uniform numbers that depend on (seed, layer, row, position) alone: on no batch, padding, device or call order.

    Args:
        seed, layer: integers.
        row: integers that broadcast against position: row inside its sequence.
        position: integers, original positions.
    Returns:
        float32 in [0, 1), 24 random bits, of the broadcast shape.
    """
    state = _mixed(torch.full_like(row, seed, dtype=torch.int64) + 0x1E3779B97F4A7C15)
    for number in (torch.full_like(row, layer, dtype=torch.int64), row.long(), position.long()):
        state = _mixed((state ^ number) + 0x1E3779B97F4A7C15)
    return ((state >> 40) & 0xFFFFFF).float() / (1 << 24)
