# SPDX-License-Identifier: Apache-2.0
"""What a compressed cache holds, in tokens and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uncomp.keys import road


def read_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors on the CPU, of their shapes, as float64 (exact for 32-bit values); one wait for each device."""
    made: list[Tensor | None] = [None] * len(tensors)
    for device in {t.device for t in tensors}:
        places = [i for i, t in enumerate(tensors) if t.device == device]
        flat = torch.cat([tensors[i].double().flatten() for i in places]).cpu()
        parts = flat.split([tensors[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            made[i] = part.view(tensors[i].shape)
    return made


@dataclass
class Ledger:
    """What a cache's size can be told from, without holding its keys and values."""

    policy: str
    num_kv_heads: int
    clock: Any
    layers: int
    other_layers: int
    row_len: list[Tensor]  # one [R] a layer
    deleted: int  # rows of the model that store nothing, over all sequences and layers
    statistic: list[Tensor]
    kv_bytes: int
    state_bytes: int
    other_bytes: int
    token_bytes: int  # keys and values of one token and KV head at full width
    slot_bytes: list[int]  # what a layer stores for one token of one of its rows: less for latents
    road: str | None  # how steps come to keys
    reached: list[list[int]] | None  # [L][B] tokens of the prompt that reached each layer, where it was pruned


def ledger_of(cache) -> Ledger:
    """The ledger of a compressed cache as it is now.

    Raises:
        ValueError: the cache is none of ours.
    """
    shared = getattr(cache, "uncomp", None)
    if shared is None:
        raise ValueError(f"uncomp.cache_stats: cache must be compressed by uncomp; got {type(cache).__name__}")
    ragged = [layer.ragged for layer in shared.layers if layer.ragged is not None]
    ours = {id(layer) for layer in shared.layers}
    others = [layer for layer in cache.layers if id(layer) not in ours]
    states = [t for layer in others for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
    token = 0
    if ragged:
        token = 2 * shared.shape.head_dim * ragged[0].key_rows.element_size()
    return Ledger(
        policy=shared.config.policy,
        num_kv_heads=shared.shape.num_kv_heads,
        clock=shared.clock,
        layers=len(shared.layers),
        other_layers=len(others),
        row_len=[r.row_len for r in ragged],
        deleted=sum(r.source.numel() - r.kept.numel() for r in ragged if r.kept is not None),
        statistic=[r.statistic for r in ragged if r.statistic is not None],
        kv_bytes=sum(r.kv_bytes for r in ragged),
        state_bytes=sum(r.state_bytes for r in ragged),
        other_bytes=sum(t.numel() * t.element_size() for t in states),
        token_bytes=token,
        slot_bytes=[(r.key_rows.shape[-1] + r.value_rows.shape[-1]) * r.key_rows.element_size() for r in ragged],
        road=max(filter(None, map(road, ragged)), default=None),  # "torch: why" before "kernel"
        reached=shared.reached,
    )


def cache_stats(cache) -> dict[str, Any]:
    """Counts what a compressed cache stores; reads row lengths back from the device.

    Args:
        cache: an UncompCache, or a cache that a patched model filled.
    Returns:
        policy, batch, layers (compressed), other_layers, logical_tokens (columns seen, padding included),
        real_tokens [B], stored_tokens_mean / _min / _max (over rows), deleted_rows (which store nothing and
        count as rows of 0 tokens; over sequences and layers), cache_bytes (keys and values, free slots
        included), key_road (None: keys are stored; "kernel": kernels make them tile by tile of what is stored;
        "torch: " and the reason: torch makes all of them at each step), state_bytes (positions, layout, votes),
        other_bytes (layers left uncompressed), full_cache_bytes (native GQA, every real token of the compressed
        layers), nan_entropy_rows, displaced_tokens, reached_tokens ([layers][B] tokens of the prompt that went through
        each layer; None where it was not pruned).
    Raises:
        ValueError: the cache is none of ours.
    """
    return stats_of(ledger_of(cache))


def stats_of(ledger: Ledger) -> dict[str, Any]:
    """See cache_stats."""
    unknown = [s.isnan().sum(1) for s in ledger.statistic]  # [B] a layer
    read = read_together([*ledger.row_len, *unknown])
    none = torch.zeros(1, dtype=torch.int32, device="cpu")
    lengths = torch.cat(read[: len(ledger.row_len)]).double() if ledger.row_len else none.double()
    unknown = torch.cat([none, *read[len(ledger.row_len) :]])
    lengths = torch.cat([lengths, lengths.new_zeros(ledger.deleted)])
    real = ledger.clock.real()
    return {
        "policy": ledger.policy,
        "batch": len(real),
        "layers": ledger.layers,
        "other_layers": ledger.other_layers,
        "logical_tokens": ledger.clock.columns,
        "real_tokens": real,
        "stored_tokens_mean": float(lengths.mean()),
        "stored_tokens_min": int(lengths.min()),
        "stored_tokens_max": int(lengths.max()),
        "deleted_rows": ledger.deleted,
        "cache_bytes": ledger.kv_bytes,
        "key_road": ledger.road,
        "state_bytes": ledger.state_bytes,
        "other_bytes": ledger.other_bytes,
        "full_cache_bytes": ledger.layers * sum(real) * ledger.num_kv_heads * ledger.token_bytes,
        "nan_entropy_rows": int(unknown.sum()),
        "displaced_tokens": ledger.clock.displaced,
        "reached_tokens": ledger.reached,
    }
