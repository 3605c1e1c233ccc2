# SPDX-License-Identifier: Apache-2.0
"""Takes query vectors [B, Hq, S, D] of a layer, rotated.

Gives one entropy per cache row, [B, rows] float32, share of ln D.
Formula: H_k = -sum s ln s over the k largest eigenvalues s of the token covariance; mean or max over a row's heads.
Beside it the variance of the same vectors, a statistic that the order of rows is compared with.
docs/method.md "Entropy".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uncomp import ops

KINDS = ("truncated", "renormalized", "renyi2")
STATISTICS = (*KINDS, "variance")  # what rows may be ordered by
WITHOUT_TOP = ("renyi2", "variance")  # no k: all eigenvalues enter, or none
REDUCTIONS = ("mean", "max")


def default_top(head_dim: int) -> int:
    """Eigenvalues kept by default: a quarter of the head dim, at least 1."""
    return max(1, head_dim // 4)


def elbow(spectrum: Sequence[float]) -> int:
    """Number of eigenvalues at the elbow of a spectrum: where it hangs furthest below its chord.

    Args:
        spectrum: D values, largest first; meant is the mean over all layers and heads of a calibration run.
    Returns:
        The smallest i in 1 .. D that maximises s_1 + (s_D - s_1)(i - 1)/(D - 1) - s_i; D if no value lies below.
    Raises:
        ValueError: fewer than two values, or NaN.
    Source: docs/method.md "Entropy".
    """
    values = [float(s) for s in spectrum]
    dim = len(values)
    if dim < 2 or any(s != s for s in values):
        raise ValueError(f"uncomp.entropy: spectrum must hold two or more numbers and no NaN; got {values}")
    first, last = values[0], values[-1]
    depth = [first + (last - first) * i / (dim - 1) - s for i, s in enumerate(values)]
    deepest = max(depth)
    return dim if deepest <= 0 else depth.index(deepest) + 1


def reduce_heads(entropy: Tensor, rows: int, reduce: str = "mean") -> Tensor:
    """One value per cache row from the values of its query heads; NaN stays NaN.

    Args:
        entropy: [..., Hq], query heads of a row side by side.
        rows: rows of a sequence, Hkv or Hq; divides Hq.
        reduce: "mean" or "max" over the Hq / rows heads of a row.
    Returns:
        [..., rows], dtype of entropy.
    Raises:
        ValueError: rows do not divide Hq, or an unknown reduction.
    Source: docs/method.md "Entropy".
    """
    heads = entropy.shape[-1]
    if rows < 1 or heads % rows:
        raise ValueError(f"uncomp.entropy: rows must divide the query heads Hq = {heads}; got {rows}")
    if reduce not in REDUCTIONS:
        raise ValueError(f"uncomp.entropy: reduce must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")
    if rows == heads:
        return entropy
    grouped = entropy.unflatten(-1, (rows, heads // rows))
    return grouped.mean(dim=-1) if reduce == "mean" else grouped.amax(dim=-1)


def row_entropy(
    query: Tensor,
    rows: int,
    *,
    top: int | None = None,
    kind: str = "truncated",
    reduce: str = "mean",
    first: Tensor | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """Entropy of every cache row of a layer from its rotated queries. No host sync.

    Args:
        query: [B, Hq, S, D] float32, float16 or bfloat16 (on CPU also float64); any strides with D contiguous.
        rows: rows of a sequence: Hkv, or Hq for one row per query head.
        top: eigenvalues k that enter, 1 to D; default a quarter of D. "renyi2" ignores it: all D enter.
        kind: "truncated", "renormalized", "renyi2"; or "variance", which is no entropy and has no top.
        reduce: "mean" or "max" over the Hq / rows query heads of a row.
        first, length: [B] int32, first real token and number of real tokens; default: all are real.
    Returns:
        [B, rows] float32, share of ln D (variance: squared units of the query). NaN where a real token of one of the
        row's heads holds NaN or Inf.
    Raises:
        TypeError: query not floating point.
        ValueError: a wrong shape, rows that do not divide Hq, top outside 1 .. D, an unknown kind or reduction.
    Source: docs/method.md "Entropy".
    """
    if query.dim() != 4:
        raise ValueError(f"uncomp.entropy: query must have shape [B, Hq, S, D]; got {list(query.shape)}")
    if kind not in STATISTICS:
        raise ValueError(f"uncomp.entropy: kind must be one of {', '.join(STATISTICS)}; got {kind!r}")
    dim = query.shape[3]
    wanted = default_top(dim) if top is None else top
    if not 1 <= wanted <= dim:
        raise ValueError(f"uncomp.entropy: top must lie in [1, D = {dim}]; got {top}")
    if kind == "variance":
        return reduce_heads(head_variance(query, first, length), rows, reduce)
    wanted = dim if kind == "renyi2" else wanted
    spectrum = ops.matrix_spectrum(query, wanted, first=first, length=length)
    entropy, _ = ops.matrix_entropy(spectrum, wanted, dim, kind=kind)
    return reduce_heads(entropy, rows, reduce).float()


def head_variance(query: Tensor, first: Tensor | None = None, length: Tensor | None = None) -> Tensor:
    """Variance of the vectors of each head over the real tokens, mean over the channels. No host sync.

    Args:
        query: [B, H, S, D] of any floating dtype. first, length: as row_entropy.
    Returns:
        [B, H] float32, squared units of the query; 0 for a head without tokens, NaN where a real token holds NaN.
    Source: docs/method.md "Grouping".
    """
    if first is None or length is None:
        return query.float().var(dim=2, correction=0).mean(-1) if query.shape[2] else query.float().sum((2, 3))
    column = torch.arange(query.shape[2], device=query.device)
    live = (column >= first.unsqueeze(1)) & (column < (first + length).unsqueeze(1))
    live = live[:, None, :, None]
    count = length.clamp(min=1).view(-1, 1, 1, 1)
    states = query.float().masked_fill(~live, 0.0)  # padding may hold NaN
    centred = (states - states.sum(2, keepdim=True) / count).masked_fill(~live, 0.0)
    return (centred.square().sum(2, keepdim=True) / count).mean(-1).squeeze(-1)
