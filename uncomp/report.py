# SPDX-License-Identifier: Apache-2.0
"""What a compressed cache holds, in tokens and bytes."""

from __future__ import annotations

from typing import Any

import torch


def cache_stats(cache) -> dict[str, Any]:
    """Counts what a compressed cache stores; reads row lengths back from the device.

    Args:
        cache: an UncompCache, or a cache that a patched model filled.
    Returns:
        policy, batch, layers (compressed), other_layers, logical_tokens (columns seen, padding included),
        real_tokens [B], stored_tokens_mean / _min / _max (over rows), cache_bytes (keys and values, free slots
        included), state_bytes (positions, layout, votes), other_bytes (layers left uncompressed), full_cache_bytes
        (native GQA, every real token of the compressed layers), nan_entropy_rows, displaced_tokens.
    Raises:
        ValueError: the cache is none of ours.
    """
    shared = getattr(cache, "uncomp", None)
    if shared is None:
        raise ValueError(f"uncomp.cache_stats: cache must be compressed by uncomp; got {type(cache).__name__}")
    ragged = [layer.ragged for layer in shared.layers if layer.ragged is not None]
    lengths = torch.cat([r.row_len.cpu() for r in ragged]).float() if ragged else torch.zeros(1)
    shape, real = shared.shape, shared.clock.real()
    item = ragged[0].key_rows.element_size() if ragged else 0
    widths = ragged[0].key_rows.shape[1] + ragged[0].value_rows.shape[1] if ragged else 0
    ours = {id(layer) for layer in shared.layers}
    others = [layer for layer in cache.layers if id(layer) not in ours]
    other_bytes = sum(
        t.numel() * t.element_size()
        for layer in others
        for t in (layer.keys, layer.values)
        if isinstance(t, torch.Tensor)
    )
    return {
        "policy": shared.config.policy,
        "batch": len(real),
        "layers": len(shared.layers),
        "other_layers": len(others),
        "logical_tokens": shared.clock.columns,
        "real_tokens": real,
        "stored_tokens_mean": float(lengths.mean()),
        "stored_tokens_min": int(lengths.min()),
        "stored_tokens_max": int(lengths.max()),
        "cache_bytes": sum(r.kv_bytes for r in ragged),
        "state_bytes": sum(r.state_bytes for r in ragged),
        "other_bytes": other_bytes,
        "full_cache_bytes": len(shared.layers) * sum(real) * shape.num_kv_heads * widths * item,
        "nan_entropy_rows": sum(int(r.statistic.isnan().sum()) for r in ragged if r.statistic is not None),
        "displaced_tokens": shared.clock.displaced,
    }
