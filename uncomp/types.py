# SPDX-License-Identifier: Apache-2.0
"""Small values that stages hand to each other; shapes at each field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheShape:
    """What a policy must know of a model before it sees a prompt."""

    num_layers: int  # compressed layers
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rows: int  # cache rows of a sequence and layer: num_kv_heads, or num_q_heads with rows="query_head"
    layers: tuple[int, ...] = ()  # which of the model's layers are compressed; empty: all there are
    model_layers: int = 0  # layers of the model, compressed or not; 0: as many as are compressed
    model_type: str = ""  # as in its config; with config_hash what a profile is compared with; empty: not known
    config_hash: str = ""


@dataclass
class Lengths:
    """Real tokens among the columns of a batch: known to the host, and on any device on request."""

    length: list[int]  # [B] real tokens
    seq_len: int  # columns S
    first: list[int] = None  # [B] first real column; default: left padding
    _on_device: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.first is None:
            self.first = [self.seq_len - n for n in self.length]

    @property
    def padded(self) -> bool:
        """True if a sequence has a column that is no real token."""
        return any(n != self.seq_len for n in self.length)

    @staticmethod
    def upload(several: list[Lengths], device: torch.device) -> None:
        """Copies the numbers of several batches of one size to a device, in one transfer."""
        table = torch.tensor([[each.first, each.length] for each in several], dtype=torch.int32, device=device)
        for each, (first, length) in zip(several, table, strict=True):
            each._on_device[device] = first, length

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """first and length, [B] int32 each."""
        if device not in self._on_device:
            self._on_device[device] = tuple(
                torch.tensor(values, dtype=torch.int32, device=device) for values in (self.first, self.length)
            )
        return self._on_device[device]


@dataclass(frozen=True)
class DecodeRule:
    """What leaves when a token enters a full row.

    kind "vote": smallest pooled vote of the last `vote_window` queries (docs/method.md "Decode"); "running": smallest
    attention mass since the prompt; "last": smallest weight of the newest query, one choice for all rows of a layer;
    "position": the oldest token that is no sink. `newest` tokens never leave; with `newest_share` that share of the
    row's room instead.
    """

    kind: Literal["vote", "running", "last", "position"] = "vote"
    newest: int = 8  # tokens
    newest_share: float = 0.0
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("vote", "running", "last", "position"):
            raise ValueError(f"uncomp: kind of a DecodeRule must be vote, running, last or position; got {self.kind!r}")


@dataclass(frozen=True)
class PlanRequest:
    """What `limits` may use. N rows: those of one layer, or with scope="model" of all layers, layer by layer."""

    layers: list[int]  # indices among the compressed layers
    lengths: list[int]  # [B] tokens that each sequence has in this layer, or has seen so far in a later turn
    totals: list[int]  # [B] tokens that the N rows of a sequence share
    statistic: Tensor | None  # [B, N] float32
    scores: list[Tensor]  # one [R, columns] float32 a layer, not pooled
    candidates: list[Tensor]  # one [R] int32 a layer, live columns of the scores
    device: torch.device


@dataclass
class Plan:
    """Limits and host totals of layers that were planned together."""

    limits: list[Tensor]  # one [B, rows] int32 a layer, on the layer's device
    slots: list[list[int]]  # one [B] a layer: sum of the limits of each sequence
    stored: list[list[int]]  # one [B] a layer: tokens that a prompt stores at once
