# SPDX-License-Identifier: Apache-2.0
"""Which tokens the rows of a compressed cache hold: what of an answer is gone everywhere, how alike heads choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    """Looks at the positions of all stored tokens of a batch, and reads the result back; see `look`."""
    return shares(look(layers, evidence, tokens).tolist())


def shares(table: Sequence[Sequence[float]]) -> list[KeptShare]:
    """What `look` gave, once it is on the host."""
    known = [[None if math.isnan(value) else value for value in line] for line in table]
    return [KeptShare(evicted, consensus) for evicted, consensus in zip(*known, strict=True)]


def look(layers: Sequence[RaggedLayer], evidence: Sequence[Sequence[int]], tokens: int) -> torch.Tensor:
    """Looks at the positions of all stored tokens of a batch; a deleted row holds nothing and is left out.

    Nothing waits for what is computed here, so that a decode step can be on its way before it is read.

    Args:
        layers: compressed layers of a cache.
        evidence: for each sequence positions of the answer's tokens, counted in real tokens.
        tokens: positions to look at, as many as the longest prompt has.
    Returns:
        [2, B] float32 on the first layer's device: share of the answer that is gone, head consensus; NaN for None.
        Cost: a table [rows of several layers, tokens] float32 of at most `HELD_BYTES`, or of one layer, and products of
        its parts with themselves.
    """
    batch, device = len(evidence), layers[0].row_len.device
    # Numbers go to the device before the first kernel does: a transfer waits for what is under way.
    places = torch.tensor(
        [[b, place] for b, some in enumerate(evidence) for place in some] or [[0, 0]], device=device
    ).unbind(1)
    count = torch.tensor([len(some) for some in evidence], device=device)
    groups = _together(layers, tokens)
    bases = [_bases(some) for some in groups]
    anywhere, alike = None, []
    for some, base in zip(groups, bases, strict=True):
        held = _held(some, base, tokens).view(len(some), batch, some[0].rows, tokens)
        found = (held.amax((0, 2)) > 0).to(device)
        anywhere = found if anywhere is None else anywhere | found
        if (rows := some[0].rows) > 1:
            both = held @ held.transpose(2, 3)
            size = held.sum(3)
            either = size[..., :, None] + size[..., None, :] - both
            one, other = torch.triu_indices(rows, rows, 1, device=both.device)
            alike.append((both / either.clamp_min(1))[..., one, other].mean(2).to(device))
    consensus = (
        torch.cat(alike).mean(0) if alike else torch.full((batch,), math.nan, dtype=torch.float32, device=device)
    )
    gone = torch.zeros(batch, dtype=torch.float32, device=device).index_add_(0, places[0], (~anywhere[places]).float())
    return torch.stack([torch.where(count > 0, gone / count, math.nan), consensus])


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


def _bases(layers: Sequence[RaggedLayer]) -> torch.Tensor:
    """[layers] int32, the first slot of each layer when their arenas stand behind each other."""
    slots = [0, *accumulate(layer.capacity for layer in layers)]
    return torch.tensor(slots[:-1], dtype=torch.int32, device=layers[0].row_len.device)


def _held(layers: Sequence[RaggedLayer], base: torch.Tensor, tokens: int) -> torch.Tensor:
    """[rows of all layers, tokens] float32, 1 where a row holds the token of a position."""
    device, slots = base.device, sum(layer.capacity for layer in layers)
    edge = torch.stack([layer.row_start for layer in layers]) + base[:, None]  # [layers, rows + 1]
    start, end = edge[:, :-1].flatten(), edge[:, 1:].flatten()
    length = torch.cat([layer.row_len for layer in layers])
    position = torch.cat([layer.slot_position for layer in layers])
    slot = torch.arange(slots, dtype=torch.int32, device=device)
    row = torch.searchsorted(end, slot, right=True).clamp(max=length.numel() - 1)
    live = slot - start[row] < length[row]
    column = torch.where(live, position.long(), tokens).clamp(max=tokens)
    held = torch.zeros(length.numel(), tokens + 1, dtype=torch.float32, device=device)
    held[row, column] = 1.0
    return held[:, :tokens]
