# SPDX-License-Identifier: Apache-2.0
"""Which tokens the rows of a compressed cache hold: what of an answer is gone everywhere, how alike heads choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from uncomp.cache import RaggedLayer

HELD_BYTES = 2**28  # of the table below


@dataclass(frozen=True)
class KeptShare:
    """What one sequence's rows hold.

    Fields:
        evicted: global eviction ratio: share of the answer's tokens that every row of every layer dropped; None where
            the prompt has no answer in it.
        consensus: head consensus: mean over layers and pairs of rows of |A and B| / |A or B|, the tokens that
            both rows hold out of those that one does; None where layers have one row.
    """

    evicted: float | None
    consensus: float | None


def kept_shares(layers: Sequence[RaggedLayer], evidence: Sequence[Sequence[int]], tokens: int) -> list[KeptShare]:
    """Looks at the positions of all stored tokens of a batch; a deleted row holds nothing and is left out.

    Args:
        layers: compressed layers of a cache.
        evidence: for each sequence positions of the answer's tokens, counted in real tokens.
        tokens: positions to look at, as many as the longest prompt has.
    Returns:
        one for each sequence. Cost: a table [rows of several layers, tokens] float32 of at most `HELD_BYTES`, or of
        one layer, and products of its parts with themselves, on the layers' device; read back once.
    """
    batch = len(evidence)
    anywhere, alike = None, []
    for some in _together(layers, tokens):
        held = _held(some, tokens).view(len(some), batch, some[0].rows, tokens)
        found = (held.amax((0, 2)) > 0).to(layers[0].row_len.device)
        anywhere = found if anywhere is None else anywhere | found
        if some[0].rows > 1:
            both = held @ held.transpose(2, 3)
            size = held.sum(3)
            either = size[..., :, None] + size[..., None, :] - both
            upper = torch.triu(torch.ones_like(both[0, 0]), 1).bool()
            alike.append((both / either.clamp_min(1))[..., upper].mean(2).to(anywhere.device))
    consensus = torch.cat(alike).mean(0).tolist() if alike else [None] * batch
    anywhere = anywhere.cpu()
    gone = [float((~anywhere[b][places]).float().mean()) if places else None for b, places in enumerate(evidence)]
    return [KeptShare(g, c) for g, c in zip(gone, consensus, strict=True)]


def _together(layers: Sequence[RaggedLayer], tokens: int) -> list[list[RaggedLayer]]:
    """Neighbouring layers of one device and as many rows, as many as one table may hold."""
    made: list[list[RaggedLayer]] = []
    for layer in layers:
        last = made[-1] if made else []
        fits = (len(last) + 1) * layer.num_rows * (tokens + 1) * 4 <= HELD_BYTES
        alike = last and (last[0].rows, last[0].row_len.device) == (layer.rows, layer.row_len.device)
        if fits and alike:
            last.append(layer)
        else:
            made.append([layer])
    return made


def _held(layers: Sequence[RaggedLayer], tokens: int) -> torch.Tensor:
    """[rows of all layers, tokens] float32, 1 where a row holds the token of a position."""
    device = layers[0].row_len.device
    room = torch.cat([layer.row_start[1:] - layer.row_start[:-1] for layer in layers])
    base = torch.tensor([layer.capacity for layer in layers]).cumsum(0).tolist()
    start = torch.cat([layer.row_start[:-1] + b for layer, b in zip(layers, [0, *base[:-1]], strict=True)])
    length = torch.cat([layer.row_len for layer in layers])
    position = torch.cat([layer.slot_position for layer in layers])
    slot = torch.arange(base[-1], dtype=torch.int32, device=device)
    row = torch.searchsorted(start + room, slot, right=True).clamp(max=length.numel() - 1)
    live = slot - start[row] < length[row]
    column = torch.where(live, position.long(), tokens).clamp(max=tokens)
    held = torch.zeros(length.numel(), tokens + 1, device=device)
    held[row, column] = 1.0
    return held[:, :tokens]
