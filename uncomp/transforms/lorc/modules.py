# SPDX-License-Identifier: Apache-2.0
"""What takes the place of a layer's projections. Each gives and takes the shapes of the one it replaces.

transformers views what a projection gives as heads of D channels, so latents of values leave it padded with zeros; the
cache stores the first ones alone, and the output projection reads them alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear, pad

from uncomp import latent


def _parameter(tensor: Tensor | None, like: Tensor) -> Parameter | None:
    if tensor is None:
        return None
    return Parameter(tensor.to(like.device, like.dtype).contiguous(), requires_grad=False)


class Rebuilt(torch.nn.Module):
    """Keys of low rank, or values of latents that heads share: latent @ basis + bias. Leaves the latents behind.

    Args:
        down: [heads * rank, E]. basis: [heads, rank, D]. bias: [heads * D] or None. like: for dtype and device. Where
            s heads share latents, these count for one head of s * D channels.
    """

    codec: latent.KeyCodec | None = None  # of keys, set by who knows the layer

    def __init__(self, down: Tensor, basis: Tensor, bias: Tensor | None, like: Tensor) -> None:
        super().__init__()
        self.exact: torch.nn.Module | None = None  # the original, where prompts run exactly
        self.heads, self.rank, self.head_dim = basis.shape
        self.down, self.basis, self.bias = (_parameter(t, like) for t in (down, basis, bias))

    def leave(self, states: Tensor) -> Tensor:
        """Latents of [..., E], which the attention finds too."""
        rows = linear(states, self.down)
        latent.leave(self, rows)
        return rows

    def forward(self, states: Tensor) -> Tensor:
        """[..., E] to [..., heads * D]."""
        rows = self.leave(states)
        if self.exact is not None and latent.is_exact():
            return self.exact(states)
        keys = torch.einsum("...hr,hrd->...hd", rows.unflatten(-1, (self.heads, self.rank)), self.basis.to(rows.dtype))
        return keys.flatten(-2) if self.bias is None else keys.flatten(-2) + self.bias.to(keys.dtype)


class PaddedProjection(torch.nn.Module):
    """Latents of each head, padded with zeros to D channels: values, and keys or queries of absorbed factors.

    Args:
        down: [heads * rank, E]. bias: [heads * rank] or None. head_dim: D. like: for dtype and device.
    """

    codec: latent.KeyCodec | None = None  # of keys

    def __init__(self, down: Tensor, bias: Tensor | None, heads: int, head_dim: int, like: Tensor) -> None:
        super().__init__()
        self.exact: torch.nn.Module | None = None  # the original, where prompts run exactly
        self.heads, self.rank, self.head_dim = heads, down.shape[0] // heads, head_dim
        self.down, self.bias = _parameter(down, like), _parameter(bias, like)

    def leave(self, states: Tensor) -> Tensor:
        """Latents of [..., E], which the attention finds too."""
        rows = linear(states, self.down, self.bias)
        latent.leave(self, rows)
        return rows

    def forward(self, states: Tensor) -> Tensor:
        """[..., E] to [..., heads * D]."""
        if self.exact is not None and latent.is_exact():
            self.leave(states)
            return self.exact(states)
        rows = linear(states, self.down, self.bias)
        return pad(rows.unflatten(-1, (self.heads, self.rank)), (0, self.head_dim - self.rank)).flatten(-2)


class FoldedOutput(torch.nn.Module):
    """The output projection with the values' basis folded in.

    Args:
        weight: [E, Hq * rank]. bias: [E] or None. heads: Hq. head_dim: D. like: for dtype and device.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, heads: int, head_dim: int, like: Tensor) -> None:
        super().__init__()
        self.exact: torch.nn.Module | None = None  # the original, where prompts run exactly
        self.heads, self.rank, self.head_dim = heads, weight.shape[1] // heads, head_dim
        self.weight, self.bias = _parameter(weight, like), _parameter(bias, like)

    def forward(self, states: Tensor) -> Tensor:
        """[..., Hq * rank], or [..., Hq * D] of which only the first channels of each head count; to [..., E]."""
        latent.forget()  # where an attention ran that does not store them
        if self.exact is not None and latent.is_exact():
            return self.exact(states)
        if states.shape[-1] != self.heads * self.rank:
            states = states.unflatten(-1, (self.heads, self.head_dim))[..., : self.rank].flatten(-2)
        return linear(states, self.weight, self.bias)


class SplitProjections(torch.nn.Module):
    """Takes the place of one module for queries, keys and values: three, whose results lie one behind the other.

    Args:
        q_proj: queries, a torch.nn.Linear or PaddedProjection. k_proj: keys. v_proj: values.
    """

    def __init__(self, q_proj: torch.nn.Module, k_proj: torch.nn.Module, v_proj: torch.nn.Module) -> None:
        super().__init__()
        self.exact: torch.nn.Module | None = None  # the original, where prompts run exactly
        self.q_proj, self.k_proj, self.v_proj = q_proj, k_proj, v_proj

    def forward(self, states: Tensor) -> Tensor:
        """[..., E] to [..., (Hq + 2 Hkv) * D]."""
        if self.exact is not None and latent.is_exact():
            self.k_proj.leave(states)
            self.v_proj.leave(states)
            return self.exact(states)
        return torch.cat((self.q_proj(states), self.k_proj(states), self.v_proj(states)), -1)
