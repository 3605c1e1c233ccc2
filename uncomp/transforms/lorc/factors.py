# SPDX-License-Identifier: Apache-2.0
"""Weights of one layer, head by head: condition numbers, truncated factors, and what is folded into other weights.

Weights are as in torch.nn.Linear, [out, in]. A head's matrix W [E, D] becomes A B with B [r, D] of orthonormal rows and
A = W Bᵀ, so lengths and angles of latents are those of what they stand for. Source: docs/policies.md "LoRC".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST = (
    1e-6  # of the largest singular value: what a smaller one counts as, so that a near-singular layer stays finite
)
_MORE = 8  # directions that the randomised search looks at beyond the rank
_POWER = 2  # its power iterations


def per_head(weight: Tensor, heads: int) -> Tensor:
    """[heads, D, E] float64 of a projection's weight [heads * D, E]."""
    return weight.detach().double().view(heads, -1, weight.shape[1])


def log_kappa(weight: Tensor, heads: int, kind: str, name: str = "a head") -> float:
    """Natural log of the condition number of a projection.

    From the eigenvalues of W Wᵀ, several times faster than singular values of W: one of 1e-6 of the largest comes out
    within a few 1e-4 of itself, larger ones better.

    Args:
        weight: [heads * D, E].
        kind: "layer" (of the whole matrix) or "per_head_mean" (mean of the heads' logarithms).
        name: what errors call the matrix.
    Raises:
        ValueError: a weight that is zero or not finite.
    """
    matrices = per_head(weight, heads if kind == "per_head_mean" else 1)
    if not matrices.isfinite().all():
        raise ValueError(f"uncomp.lorc: weights of {name} must be finite; got NaN or infinity")
    narrow = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    logs = []
    for values in torch.linalg.eigvalsh(gram(narrow)).tolist():
        largest = values[-1]
        if largest <= 0:
            raise ValueError(f"uncomp.lorc: weights of {name} must not all be zero; got zeros")
        logs.append(math.log(largest / max(values[0], SMALLEST**2 * largest)) / 2)
    return sum(logs) / len(logs)


def gram(matrices: Tensor) -> Tensor:
    """[heads, D, D] of [heads, D, E]: inner products of rows."""
    return matrices @ matrices.mT


def exact_basis(matrices: Tensor, rank: int) -> Tensor:
    """Leading right singular vectors of the heads' matrices Wᵀ.

    Args:
        matrices: [heads, D, E] float64.
    Returns:
        [heads, rank, D] float64, orthonormal rows.
    """
    return whitened_basis(gram(matrices), rank)


def random_basis(matrices: Tensor, rank: int, seed: int) -> Tensor:
    """As exact_basis, by a seeded random range finder; exact where the rank is near D."""
    heads = matrices.shape[0]
    width = rank + _MORE
    if width >= min(matrices.shape[1:]):
        return exact_basis(matrices, rank)
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(heads, matrices.shape[2], width, generator=generator, dtype=torch.float64, device="cpu")
    found = torch.linalg.qr(matrices @ start.to(matrices.device)).Q  # [heads, D, width]
    for _ in range(_POWER):
        found = torch.linalg.qr(matrices @ torch.linalg.qr(matrices.mT @ found).Q).Q
    return exact_basis(found.mT @ matrices, rank) @ found.mT


def whitened_basis(moment: Tensor, rank: int) -> Tensor:
    """Directions that hold most of what a projection gave on calibration tokens.

    With XᵀX = S Sᵀ the right singular vectors of SᵀW are the eigenvectors of Wᵀ XᵀX W, the second moment of the
    projection's outputs; so neither S nor its inverse is needed, and XᵀX may be singular.

    Args:
        moment: [heads, D, D] float64, sum over tokens of the outputs' outer products.
    Returns:
        [heads, rank, D] float64, orthonormal rows.
    """
    return torch.linalg.eigh(moment).eigenvectors.flip(-1).mT[:, :rank]


def down(matrices: Tensor, basis: Tensor) -> Tensor:
    """[heads * rank, E] float64: the projection to latents, x A = x W Bᵀ. Also a query projection that absorbs B."""
    return (basis @ matrices).flatten(0, 1)


def folded_output(weight: Tensor, bias: Tensor | None, basis: Tensor, value_bias: Tensor | None) -> tuple:
    """The output projection that takes latents of values.

    Args:
        weight: [E, Hq * D]. bias: [E] or None. basis: [Hkv, rank, D] float64. value_bias: [Hkv * D] or None.
    Returns:
        weight [E, Hq * rank] float64, and bias [E] float64 or None: weights of attention sum to 1, so the values' bias
        leaves every head unchanged.
    """
    heads, dim = basis.shape[0], basis.shape[2]
    wide = weight.detach().double()
    by_head = wide.view(wide.shape[0], -1, dim)  # [E, Hq, D]
    group = by_head.shape[1] // heads
    folded = torch.einsum("eqd,qrd->eqr", by_head, basis.repeat_interleave(group, 0)).flatten(1)
    total = None if bias is None else bias.detach().double()
    if value_bias is not None:
        spread = value_bias.detach().double().view(heads, dim).repeat_interleave(group, 0).flatten()
        total = wide @ spread if total is None else total + wide @ spread
    return folded, total
