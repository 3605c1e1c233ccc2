# SPDX-License-Identifier: Apache-2.0
"""Keys stored as latents of 64 numbers: how benchmarks make them again, and the same in plain torch."""

import torch

from uncomp.ops import KeyTransform

RANK = 64


def key_transform(rows: int, dim: int, dtype: torch.dtype) -> KeyTransform:
    """A basis, and the frequencies of Llama 3, for `rows` KV heads of `dim` channels."""
    generator = torch.Generator("cuda").manual_seed(9)
    basis = torch.randn(rows, RANK, dim, device="cuda", generator=generator) * RANK**-0.5
    frequency = 500000.0 ** (-torch.arange(dim // 2, device="cuda") * 2 / dim)
    return KeyTransform(basis.to(dtype), frequency=frequency.float())


def eager_keys(latents: torch.Tensor, position: torch.Tensor, transform: KeyTransform) -> torch.Tensor:
    """Keys [rows, n, D] of latents [rows, n, RANK] at positions [rows, n], as a model would write it."""
    keys = latents @ transform.basis
    angle = position[..., None] * transform.frequency
    cos, sin = angle.cos().to(keys.dtype), angle.sin().to(keys.dtype)
    x, y = keys.chunk(2, -1)
    return torch.cat((x * cos - y * sin, y * cos + x * sin), -1)
