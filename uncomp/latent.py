# SPDX-License-Identifier: Apache-2.0
"""Keys of which fewer numbers are stored than attention needs: how they come to the cache, and are made again.

A projection of low rank leaves what is to be stored, the latents, in a thread-local slot; the attention function of
its layer takes them. A codec turns stored rows into the keys that a query meets. Source: docs/policies.md "LoRC".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from uncomp._extension import limits
from uncomp.ops import KeyTransform

_WAITING = 2  # latents that can wait for one attention: those of keys and of values
MARK = "_uncomp_lorc"  # attribute of a text stack whose projections are of low rank
_slot = threading.local()


def leave(owner: object, latent: Tensor) -> None:
    """Leaves the latents [B, T, heads * rank] of a projection for the attention that follows it.

    Those of layers whose attention took none are let go, so that a model that runs another one holds no more of them.
    """
    if not hasattr(_slot, "latents"):
        _slot.latents = {}
    _slot.latents.pop(id(owner), None)
    while len(_slot.latents) >= _WAITING:
        _slot.latents.pop(next(iter(_slot.latents)))
    _slot.latents[id(owner)] = latent


def take(owner: object) -> Tensor:
    """What `owner` left last, once.

    Raises:
        RuntimeError: it left nothing: keys or values come from elsewhere.
    """
    found = getattr(_slot, "latents", {}).pop(id(owner), None)
    if found is None:
        raise RuntimeError("uncomp: the projections of this layer did not run before its attention")
    return found


def forget() -> None:
    """Drops what nobody took: the model runs another attention."""
    _slot.latents = {}


def run_exactly(on: bool) -> None:
    """From now on projections of this thread that hold their original give what that gives, or no longer do."""
    _slot.exact = on


def is_exact() -> bool:
    """Whether this thread is in a prompt that runs exactly (LorcConfig.exact_prefill)."""
    return getattr(_slot, "exact", False)


class KeyCodec(Protocol):
    """Turns stored rows into keys."""

    rank: int  # numbers that are stored of a key
    heads: int  # rows of a sequence that store one each: KV heads, or groups of them
    shared: int  # KV heads whose keys and values one stored row stands for
    reason: str | None  # why kernels cannot attend to stored rows; None: they can

    def prepare(self, dtype: torch.dtype) -> None:
        """Called before tokens of a prompt are stored as `dtype`: from then on what steps need has its memory."""

    def keys(self, latent: Tensor, position: Tensor, head: Tensor) -> Tensor:
        """Keys as a query meets them.

        Args:
            latent: [R, n, rank]. position: [R, n] int, model positions. head: [R] int64, which of `heads` a row is.
        Returns:
            [R, n, shared * D].
        """


@dataclass
class PaddedKeys:
    """Stored rows are keys whose other channels are zero: the query projection holds the rest."""

    rank: int
    heads: int
    head_dim: int
    shared: int = 1
    reason: str | None = None

    def prepare(self, dtype: torch.dtype) -> None:
        """See KeyCodec; nothing: what is stored meets the first channels of a query."""

    def keys(self, latent: Tensor, position: Tensor, head: Tensor) -> Tensor:
        """See KeyCodec."""
        return torch.nn.functional.pad(latent, (0, self.head_dim - self.rank))


@dataclass(frozen=True)
class KeyConstants:
    """What turns and normalises keys, in numbers: key[i] of a rotated pair turns by frequency[i] a position."""

    frequency: Tensor  # [rotated / 2] float32, radians a position
    scale: float  # of the rotated keys
    norm: Tensor | None  # [D] float32, factor of each channel behind x / sqrt(mean x² + eps); None: no norm
    eps: float


@dataclass
class RotaryKeys:
    """Stored rows are factors of keys before normalisation and rotation: key = rotate(norm(latent @ basis + bias)).

    Kernels make these keys tile by tile where `constants` has the numbers for it (see `transform`).
    """

    projection: torch.nn.Module  # has basis [heads, rank, shared * D] and bias [heads * shared * D] or None
    head_dim: int  # D
    norm: Callable[[Tensor], Tensor] | None  # of a head's keys
    angles: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (like, position [1, n]) -> cos, sin [1, n, rotated]
    constants: Callable[[], KeyConstants | str]  # the numbers, or why there are none
    values: torch.nn.Module | None = None  # where heads share what is stored: as `projection`, of their values
    reason: str | None = field(default="nothing is stored yet", init=False)
    _made: KeyTransform | None = field(default=None, init=False, repr=False)
    _stamp: tuple = field(default=(), init=False, repr=False)

    @property
    def rank(self) -> int:
        """See KeyCodec."""
        return self.projection.rank

    @property
    def heads(self) -> int:
        """See KeyCodec."""
        return self.projection.heads

    @property
    def shared(self) -> int:
        """See KeyCodec."""
        return self.projection.head_dim // self.head_dim

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, dtype: torch.dtype) -> None:
        """See KeyCodec. What was made of weights that were written to meanwhile is made again in the same memory, which
        recorded steps read."""
        sources = [self.projection.basis, self.projection.bias]
        sources += self.norm.parameters() if isinstance(self.norm, torch.nn.Module) else []
        sources = [t for t in sources if t is not None]
        places = (dtype, *((id(t), t.device, t.dtype) for t in sources))
        stamp = (places, tuple(0 if t.is_inference() else t._version for t in sources))
        if stamp == self._stamp:
            return
        made, self.reason = self._transform(dtype)
        if made is not None and self._made is not None and places == self._stamp[0]:
            for name in ("basis", "bias", "norm", "frequency"):
                if getattr(made, name) is not None:
                    getattr(self._made, name).copy_(getattr(made, name))
        else:
            self._made = made
        self._stamp = stamp

    def _transform(self, dtype: torch.dtype) -> tuple[KeyTransform | None, str | None]:
        """What kernels take, or why they cannot."""
        basis, bias = self.projection.basis.detach(), self.projection.bias
        if self.shared > 1:
            return None, f"{self.shared} heads share what is stored"
        if basis.is_cuda and self.rank > limits()["max_latent_dim"]:
            return None, f"ranks above {limits()['max_latent_dim']} are not made again on a GPU; this is {self.rank}"
        found = self.constants()
        if isinstance(found, str):
            return None, found
        if bias is not None:
            bias = bias.detach().float().view(self.heads, -1).contiguous()
        norm = None if found.norm is None else found.norm.to(basis.device)
        numbers = (bias, norm, found.eps, found.frequency.to(basis.device), found.scale)  # which may lie elsewhere
        return KeyTransform(basis.to(dtype).contiguous(), *numbers), None

    def transform(self, offset: Tensor | None) -> KeyTransform | None:
        """How kernels make keys of stored rows; None where they cannot. offset: see Latents."""
        made = self._made
        if made is None or offset is None:
            return made
        numbers = (made.bias, made.norm, made.norm_eps, made.frequency, made.rotary_scale)
        return KeyTransform(made.basis, *numbers, offset)

    def keys(self, latent: Tensor, position: Tensor, head: Tensor) -> Tensor:
        """See KeyCodec. 2 R n rank D flops, and the memory of the result about four times."""
        key = wide(self.projection, latent, head).unflatten(-1, (self.shared, self.head_dim))
        if self.norm is not None:
            key = self.norm(key)
        cos, sin = (t.view(*position.shape, 1, -1) for t in self.angles(key, position.reshape(1, -1)))
        return rotate(key, cos, sin).flatten(-2)


def wide(projection: torch.nn.Module, latent: Tensor, head: Tensor) -> Tensor:
    """[R, n, channels] of latents [R, n, rank]; head: [R] int64. projection: see RotaryKeys."""
    found = torch.bmm(latent, projection.basis.to(latent.dtype)[head])
    if projection.bias is None:
        return found
    return found + projection.bias.to(found.dtype).view(projection.heads, 1, -1)[head]


def rotate(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the layout that transformers uses: channel i turns with channel i + rotated / 2.

    Args:
        key: [..., D]. cos, sin: [..., rotated], the same shape but for the last dimension; further channels stay.
    """
    width = cos.shape[-1]
    turning, rest = key[..., :width], key[..., width:]
    half = torch.cat((-turning[..., width // 2 :], turning[..., : width // 2]), -1)
    return torch.cat((turning * cos + half * sin, rest), -1)


@dataclass
class Latents:
    """New tokens as they are stored in place of their keys and values."""

    rows: Tensor  # [B, heads of the codec, T, rank], of keys
    values: Tensor  # [B, heads of the codec, T, rank of values]
    codec: KeyCodec
    offset: Tensor | None = None  # [B] int32: model position minus stored position; None where they are equal
