# SPDX-License-Identifier: Apache-2.0
"""One new token: attend over the row and the token, then append it or let it take the place of another.

Takes: [B, Hq, 1, D] query, [B, Hkv, 1, D] key and value, a RaggedLayer. Gives: [B, Hq, 1, Dv]. Nothing is read back
to the host, nothing of the cache is copied. Source: docs/method.md "Decode".
"""

from __future__ import annotations

import torch
from torch import Tensor

from uncomp import ops
from uncomp.cache import RaggedLayer
from uncomp.config import UncompConfig
from uncomp.deletion import narrow, widen
from uncomp.keys import all_keys, attended, met, transform
from uncomp.latent import Latents, RotaryKeys
from uncomp.scoring import head_scores


def decode_step(
    layer: RaggedLayer,
    config: UncompConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    scale: float,
    latent: Latents | None = None,
) -> Tensor:
    """Attention of one new token over its rows, which take the token in.

    With decode="grow" rows must have a free slot, and the caller counts it (`RaggedLayer.count`): a step itself
    changes nothing on the host, so that it can be recorded.

    Args:
        position: [B] int32, real tokens before this one.
        scale: factor of the logits.
        latent: what is stored of the key, where the layer has a codec; rows are never deleted then.
    Returns:
        [B, Hq, 1, Dv], dtype of query.
    """
    kept = layer.kept_rows
    if kept is not None:
        query, key, value = (narrow(t, kept.row, kept.source.shape[1]) for t in (query, key, value))
        return widen(_step(layer, config, query, key, value, position, scale), kept)
    return _step(layer, config, query, key, value, position, scale, latent)


def _step(layer: RaggedLayer, config: UncompConfig, query, key, value, position, scale, latent=None) -> Tensor:
    query, key = met(layer, query), met(layer, key)
    stored = (key, value) if latent is None else (latent.rows, latent.values)
    if layer.free is not None:
        return _append(layer, query, *stored, position, scale)
    if layer.rule.kind == "vote":
        return _vote(layer, config, query, key, value, position, scale, latent)
    return _weakest(layer, config, query, key, value, position, scale, *stored)


def _vote(layer: RaggedLayer, config: UncompConfig, query, key, value, position, scale, latent) -> Tensor:
    made, keys = transform(layer), layer.key_rows
    remade = isinstance(layer.codec, RotaryKeys) and made is None
    if made is not None:
        key = latent.rows
    elif remade:
        keys = all_keys(layer)  # a passing copy: the operator writes the new key into it
    out, _ = ops.decode_evict_(
        query,
        key,
        value,
        position,
        layer.row_start,
        layer.row_len,
        keys,
        layer.value_rows,
        layer.slot_position,
        layer.state.votes,
        layer.state.vote_sum,
        layer.state.vote_step,
        layer.state.order,
        scale=scale,
        window=layer.rule.newest,
        sink=layer.rule.sinks,
        pool=config.pool_width,
        pool_mode=config.pool,
        reduce_group=config.reduce_scores,
        key_transform=made,
    )
    if remade:
        layer.put(latent, position)
    return out


def _append(layer: RaggedLayer, query, key, value, position, scale) -> Tensor:
    ops.append_kv_(
        key,
        value,
        position.unsqueeze(1),
        layer.row_start,
        layer.row_len,
        layer.key_rows,
        layer.value_rows,
        layer.slot_position,
    )
    return _over_rows(layer, query, scale)[0]


def _over_rows(layer: RaggedLayer, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one query over what a layer stores: as ops.decode_attention."""
    made = transform(layer)
    if made is None:
        return ops.decode_attention(query, *attended(layer), scale)
    rows = (layer.key_rows, layer.value_rows, layer.row_start, layer.row_len)
    return ops.decode_attention(query, *rows, scale, key_transform=made, slot_position=layer.slot_position)


def _with_new(layer: RaggedLayer, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention over what a layer stores, keys made by kernels, and a new token: key, value [B, rows, 1, ...]."""
    out, lse = _over_rows(layer, query, scale)
    grouped = query.float().unflatten(1, (layer.rows, -1))  # [B, rows, g, 1, D]
    own = (grouped * key.float().unsqueeze(2)).sum(-1).flatten(1) * scale  # [B, Hq]
    total = torch.logaddexp(lse, own)
    old, new = ((part - total).exp().unflatten(1, (layer.rows, -1))[..., None, None] for part in (lse, own))
    merged = out.float().unflatten(1, (layer.rows, -1)) * old + value.float().unsqueeze(2) * new
    return merged.flatten(1, 2).to(query.dtype)


def reduce_group(weights: Tensor, dim: int, reduce: str) -> Tensor:
    """Mean, sum or max over the query heads of a row."""
    return weights.amax(dim) if reduce == "max" else getattr(weights, reduce)(dim)


def _weakest(layer: RaggedLayer, config, query, key, value, position, scale, *kept) -> Tensor:
    """Rules that compare one number a slot: accumulated mass, the newest query's weight, or the position."""
    rows, group = layer.rows, query.shape[1] // layer.rows
    key, value, *kept = (
        t.repeat_interleave(rows // t.shape[1], 1) if t.shape[1] < rows else t for t in (key, value, *kept)
    )
    rule, start, length = layer.rule, layer.row_start[:-1], layer.row_len
    room = layer.row_start[1:] - start
    if rule.kind == "position" and transform(layer) is not None:
        out = _with_new(layer, query, key, value, scale)
    else:
        keys, *others = attended(layer)
        out, lse = ops.ragged_attention(query, keys, *others, scale, key=key, value=value)
    columns = layer.mass.shape[1]
    column = torch.arange(columns, dtype=torch.int32, device=query.device)
    place = (start.unsqueeze(1) + column).clamp(max=layer.capacity - 1).long()  # [R, columns] slots
    live = column < length.unsqueeze(1)
    when = layer.slot_position[place]
    now = position.repeat_interleave(rows).unsqueeze(1)
    new = None
    if rule.kind == "position":
        strength = when.float()
    else:
        weights, before = head_scores(query, keys, scale, layer.row_start, layer.row_len, columns)
        # The softmax over the stored tokens becomes the one over stored and new tokens; an empty row has no weights.
        share = torch.nan_to_num((before - lse).exp(), nan=0.0, posinf=0.0).view(-1, 1)
        reduce = "mean" if rule.kind == "last" else config.reduce_scores
        weights = reduce_group((weights * share).view(layer.num_rows, group, columns), 1, reduce)
        own = query.view(layer.batch, rows, group, -1).float() * key.view(layer.batch, rows, 1, -1).float()
        new = reduce_group((own.sum(-1) * scale - lse.view(layer.batch, rows, group)).exp(), -1, reduce).view(-1, 1)
        if rule.kind == "last":
            layer.mass.copy_(
                weights.view(layer.batch, rows, columns).mean(1, keepdim=True).expand(-1, rows, -1).flatten(0, 1)
            )
        else:
            layer.mass.add_(weights)
        strength = layer.mass
    newest = (room * rule.newest_share).to(torch.int32).clamp(min=rule.newest).unsqueeze(1)
    safe = (when > now - newest) | (when < rule.sinks) | ~live
    strength = torch.nan_to_num(strength, nan=-1.0).masked_fill(safe, float("inf"))
    least = strength.amin(1, keepdim=True)
    oldest = when.masked_fill(strength != least, torch.iinfo(torch.int32).max)
    taken = torch.where(length < room, length, oldest.argmin(1).to(torch.int32))
    slot = (start + taken).long()  # every row has room: the plan grants window and sinks at least
    layer.key_rows.index_copy_(0, slot, kept[0].flatten(0, 2))
    layer.value_rows.index_copy_(0, slot, kept[1].flatten(0, 2))
    layer.slot_position.index_copy_(0, slot, now.squeeze(1))
    if new is not None:
        layer.mass.scatter_(1, taken.long().unsqueeze(1), new)
    layer.row_len.copy_(torch.minimum(length + 1, room))
    return out
