# SPDX-License-Identifier: Apache-2.0
"""Several new tokens on rows that already hold some: the next turn, the next chunk of a prompt, a draft.

They attend to the stored tokens and, causally, to each other. Then the row goes back to its plan
(extend="reselect"), or keeps them all. Source: docs/method.md "Further tokens".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uncomp import ops
from uncomp.attention import dense_attention
from uncomp.cache import RaggedLayer
from uncomp.compressor import Compressor, Measured
from uncomp.deletion import narrow, widen
from uncomp.keys import attended, met
from uncomp.latent import Latents
from uncomp.rows import RowView
from uncomp.types import Lengths
from uncomp.view import PromptView


def packed(pack: Tensor, run: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Runs with columns moved so that the real ones are a suffix, and moves the result back.

    Args:
        pack: [B, T] int64, column that moves to each place.
    """
    pack = pack.to(query.device)
    out = run(moved(query, pack), moved(key, pack), moved(value, pack), scale)
    return moved(out, pack.argsort(1))


def moved(states: Tensor, index: Tensor) -> Tensor:
    """[B, H, T, D] with columns at other places; index: [B, T] int64, column that moves to each place."""
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def extend(
    ragged: RaggedLayer,
    compressor: Compressor,
    index: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk,
    scale: float,
    latent: Latents | None = None,
) -> tuple[Tensor, RaggedLayer | Measured]:
    """Attention of new tokens over a compressed layer, which takes them in.

    Args:
        index: of the layer among the compressed ones.
        query: [B, Hq, T, D]. key: [B, Hkv, T, D]. value: [B, Hkv, T, Dv]. The real tokens are a suffix.
        chunk: lengths of the new tokens, and real tokens before them (`prior`).
        latent: what is stored of the keys, where the layer has a codec; rows are never deleted then.
    Returns:
        [B, Hq, T, Dv], 0 at padding; and the layer, or what is to be planned and packed into one.
    """
    lengths, kept, statistic, dense = chunk.lengths, ragged.kept_rows, ragged.statistic, None
    prior = torch.tensor(chunk.prior, dtype=torch.int32, device=query.device)
    if not all(chunk.prior) and (statistic is not None or kept is not None):
        # Sequences whose first real tokens these are: measured now, and their rows chosen.
        begins = (prior == 0).unsqueeze(1)
        view = PromptView(index, compressor.model_shape, compressor.config, query, key, value, lengths, scale)
        if statistic is not None:
            statistic = torch.where(begins, compressor.policy.statistic(view), statistic)
        if kept is not None:
            fresh = compressor.kept_rows(view, statistic)
            kept.row.copy_(torch.where(begins, fresh.row, kept.row))
            kept.source.copy_(torch.where(begins, fresh.source, kept.source))
            dense = dense_attention(query, key, value, lengths, scale)
    if kept is None:
        return _extend(ragged, compressor, index, query, key, value, chunk, prior, statistic, scale, latent)
    rows = compressor.model_shape.rows
    query, key, value = (narrow(t, kept.row, rows) for t in (query, key, value))
    out, taken = _extend(ragged, compressor, index, query, key, value, chunk, prior, statistic, scale)
    out = widen(out, kept)
    if isinstance(taken, Measured):
        taken.kept = kept
    return out if dense is None else torch.where(begins[:, :, None, None], dense, out), taken


def _extend(
    ragged: RaggedLayer,
    compressor: Compressor,
    index: int,
    query,
    key,
    value,
    chunk,
    prior,
    statistic,
    scale,
    latent=None,
) -> tuple[Tensor, RaggedLayer | Measured]:
    """See extend; prior: [B] int32, statistic: that of the new layer, heads: those of the rows of the arena."""
    config, lengths = compressor.config, chunk.lengths
    first, length = lengths.on(query.device)
    position = prior.unsqueeze(1) + torch.arange(lengths.seq_len, dtype=torch.int32, device=query.device)
    position = position - first.unsqueeze(1)
    appends = config.keeps_all or (
        config.grows and (config.extend == "append" or lengths.seq_len < config.recompress_from)
    )
    if appends:
        if chunk.voided:
            _void(ragged, prior)
        ragged.ensure_free(max(lengths.length))
        arena, source = ragged, None
    else:
        arena, source = repacked(ragged, prior, lengths)
    out, _ = ops.ragged_attention(
        met(arena, query),
        *attended(arena),
        scale,
        key=met(arena, key),
        value=value,
        first=first if lengths.padded else None,
        length=length if lengths.padded else None,
    )
    ops.append_kv_(
        key if latent is None else latent.rows,
        value if latent is None else latent.values,
        position,
        arena.row_start,
        arena.row_len,
        arena.key_rows,
        arena.value_rows,
        arena.slot_position,
        first=first,
        length=length,
    )
    if appends:
        ragged.free -= max(lengths.length)
        ragged.recent += min(lengths.length)
        return out, ragged
    view = RowView(index, compressor.shape, config, query, arena, source, ragged, lengths, chunk.prior, scale)
    return out, Measured(view, compressor.scored(view), statistic)


def _void(ragged: RaggedLayer, prior: Tensor) -> None:
    """Drops the tokens of appended rows, which lie in position order, that a later mask took back."""
    place = torch.arange(ragged.capacity, device=prior.device)
    row = ragged.slot_rows()
    live = place - ragged.row_start[row] < ragged.row_len[row]
    lost = live & (ragged.slot_position >= prior[row // ragged.rows])
    count = torch.zeros_like(ragged.row_len).scatter_add_(0, row, lost.to(torch.int32))
    ragged.row_len.sub_(count)
    ragged.recent = max(0, ragged.recent - int(count.max()))


def repacked(ragged: RaggedLayer, prior: Tensor, lengths: Lengths) -> tuple[RaggedLayer, Tensor]:
    """The rows in position order, with room for new tokens, without tokens at positions of `prior` or above.

    Returns:
        the new arena; and for each of its slots the slot of the old arena that it came from, -1 if none.
    """
    device, rows = prior.device, ragged.rows
    slot = torch.arange(ragged.capacity, device=device)
    row = ragged.slot_rows()
    live = (slot - ragged.row_start[row] < ragged.row_len[row]) & (ragged.slot_position < prior[row // rows])
    rank = torch.where(live, (row << 32) + ragged.slot_position, torch.iinfo(torch.int64).max)
    by_position = rank.argsort()
    kept = torch.zeros_like(ragged.row_len).scatter_add_(0, row, live.to(torch.int32))
    index = (slot - ragged.row_start[row])[by_position].to(torch.int32)
    index_start = torch.cat([kept.new_zeros(1), kept.cumsum(0, dtype=torch.int32)])
    new = lengths.on(device)[1].repeat_interleave(rows)
    row_start = torch.cat([kept.new_zeros(1), (kept + new).cumsum(0, dtype=torch.int32)])
    slots = [s + n * rows for s, n in zip(ragged.slots, lengths.length, strict=True)]
    key_rows, value_rows, slot_position, row_len = ops.compact_kv(
        ragged.key_rows,
        ragged.value_rows,
        index,
        index_start,
        row_start,
        sum(slots),
        position=ragged.slot_position,
        source_start=ragged.row_start,
    )
    arena = RaggedLayer(
        key_rows,
        value_rows,
        slot_position,
        row_start,
        row_len,
        ragged.limit,
        ragged.batch,
        rows,
        slots,
        ragged.rule,
        codec=ragged.codec,
        offset=ragged.offset,
    )
    where = arena.slot_rows()
    column = torch.arange(arena.capacity, device=device) - row_start[where]
    entry = (index_start[where] + column).clamp(max=max(ragged.capacity - 1, 0)).long()
    source = torch.where(column < kept[where], by_position[entry], -1) if ragged.capacity else column.fill_(-1)
    return arena, source
