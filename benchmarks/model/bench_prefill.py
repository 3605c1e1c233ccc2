# SPDX-License-Identifier: Apache-2.0
"""Prefill of one prompt: time, most memory, and bytes that stay, with and without compression."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from engines import STOCK, Engine, cache_bytes, clean, ours, peak_bytes, running, synchronize

CONTEXTS = (8192, 32768, 131072)
RUNS = 3
WITHOUT = Engine("uncomp, full cache", {"policy": "full", "max_new_tokens": 16})


def rows(model: torch.nn.Module, contexts: tuple[int, ...] = CONTEXTS, engine: Engine | None = None) -> Iterator[dict]:
    """One row an engine and context; ms is the median over three prefills behind one that is not counted."""
    for context in contexts:
        ids = torch.randint(3, model.config.vocab_size, (1, context), device=model.device)
        for each in (STOCK, WITHOUT, engine or ours()):
            with running(model, each), torch.no_grad():
                times = []
                for _ in range(1 + RUNS):
                    out = None
                    clean(model.device)
                    synchronize(model.device)
                    begin = time.perf_counter()
                    out = model(ids, use_cache=True, logits_to_keep=1)
                    synchronize(model.device)
                    times.append(1e3 * (time.perf_counter() - begin))
                peak = peak_bytes(model.device)
                size, stored = cache_bytes(out.past_key_values)
                del out
            yield {
                "what": "prefill",
                "engine": each.name,
                "batch": 1,
                "context": context,
                "stored_tokens": stored,
                "ms": statistics.median(times[1:]),
                "spread_ms": max(times[1:]) - min(times[1:]),
                "peak_bytes": peak,
                "cache_bytes": size,
            }
