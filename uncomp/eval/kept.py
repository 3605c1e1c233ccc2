# SPDX-License-Identifier: Apache-2.0
"""Which tokens the rows of a compressed cache hold: what of an answer is gone everywhere, how alike heads choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from uncomp.cache import RaggedLayer


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


def kept_share(layers: Sequence[RaggedLayer], sequence: int, evidence: Sequence[int]) -> KeptShare:
    """Reads positions of the stored tokens; a deleted row holds nothing and is left out.

    Args:
        layers: compressed layers of a cache.
        sequence: which of the batch.
        evidence: positions of the answer's tokens, counted in real tokens.
    Returns:
        a KeptShare. Cost: one copy of the positions a layer, and a product [rows, tokens] x [tokens, rows].
    """
    anywhere = None
    alike = []
    for layer in layers:
        rows = range(sequence * layer.rows, (sequence + 1) * layer.rows)
        start = layer.row_start[rows.start : rows.stop].cpu().tolist()
        length = layer.row_len[rows.start : rows.stop].cpu().tolist()
        low = min(start)
        slots = layer.slot_position[low : max(s + n for s, n in zip(start, length, strict=True))].cpu().long()
        sets = [slots[s - low : s - low + n] for s, n in zip(start, length, strict=True)]
        width = max((int(s.max()) + 1 for s in sets if s.numel()), default=0)
        held = torch.zeros(layer.rows, width)
        for row, positions in enumerate(sets):
            held[row, positions] = 1.0
        found = held.amax(0) > 0
        if anywhere is None or anywhere.numel() < width:
            grown = torch.zeros(width, dtype=torch.bool)
            if anywhere is not None:
                grown[: anywhere.numel()] = anywhere
            anywhere = grown
        anywhere[:width] |= found
        if layer.rows > 1:
            both = held @ held.t()
            size = held.sum(1)
            either = size[:, None] + size[None, :] - both
            pair = torch.triu(torch.ones_like(both, dtype=torch.bool), 1) & (either > 0)
            if pair.any():
                alike.append(float((both / either.clamp_min(1))[pair].mean()))
    evicted = None
    if evidence:
        gone = [i for i in evidence if i >= anywhere.numel() or not anywhere[i]]
        evicted = len(gone) / len(evidence)
    return KeptShare(evicted, sum(alike) / len(alike) if alike else None)
