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


def kept_shares(layers: Sequence[RaggedLayer], evidence: Sequence[Sequence[int]], tokens: int) -> list[KeptShare]:
    """Looks at the positions of all stored tokens of a batch; a deleted row holds nothing and is left out.

    Args:
        layers: compressed layers of a cache.
        evidence: for each sequence positions of the answer's tokens, counted in real tokens.
        tokens: positions to look at, as many as the longest prompt has.
    Returns:
        one for each sequence. Cost: a table [rows of the batch, tokens] float32 and a product of it with itself a
        layer, on the layers' device; read back once.
    """
    batch = len(evidence)
    anywhere, alike = None, []
    for layer in layers:
        row = layer.slot_rows()
        slot = torch.arange(layer.capacity, device=row.device)
        live = slot - layer.row_start[row] < layer.row_len[row]
        column = torch.where(live, layer.slot_position.long(), tokens).clamp(max=tokens)
        held = torch.zeros(layer.num_rows, tokens + 1, device=row.device)
        held[row, column] = 1.0
        held = held[:, :tokens].view(batch, layer.rows, tokens)
        found = held.amax(1) > 0
        anywhere = found if anywhere is None else anywhere | found.to(anywhere.device)
        if layer.rows > 1:
            both = held @ held.transpose(1, 2)
            size = held.sum(2)
            either = size[:, :, None] + size[:, None, :] - both
            upper = torch.triu(torch.ones_like(both[0]), 1).bool()
            alike.append((both / either.clamp_min(1))[:, upper].mean(1).to(anywhere.device))
    consensus = torch.stack(alike).mean(0).tolist() if alike else [None] * batch
    anywhere = anywhere.cpu()
    gone = [[not anywhere[b, i] for i in places] for b, places in enumerate(evidence)]
    return [KeptShare(sum(g) / len(g) if g else None, c) for g, c in zip(gone, consensus, strict=True)]
