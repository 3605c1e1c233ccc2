# SPDX-License-Identifier: Apache-2.0
"""Decode steps over a cache of 32K tokens: ours, compiled or not, in stock generate or our loop, and what users have.

Caches of several sequences are one prompt's, repeated: prefilling hundreds of long prompts takes longer than all else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from engines import (
    STATIC,
    STOCK,
    Engine,
    cache_bytes,
    clean,
    ours,
    peak_bytes,
    prefilled,
    running,
    static_step_ms,
    step_ms,
)

CONTEXT, STEPS = 32768, 64
CASES: list[tuple[Engine, int]] = [
    (STOCK, 1),
    (STATIC, 1),
    (ours(), 1),
    (ours(loop=True), 1),
    (ours(compiled=True), 1),
    (ours(loop=True, compiled=True), 1),
    (ours(loop=True), 32),
    (ours(loop=True, compiled=True), 32),
    (ours(loop=True, compiled=True), 256),
]


def measure(model, engine: Engine, batch: int, context: int, steps: int) -> dict:
    """A row: milliseconds a step, tokens a second, bytes."""
    clean(model.device)
    ids = torch.randint(3, model.config.vocab_size, (1, context), device=model.device)
    with running(model, engine) as handle:
        if engine.static:
            ms, spread = static_step_ms(model, ids, batch, steps)
            size, stored = None, float(context)
        else:
            cache, token = prefilled(model, ids, batch)
            clean(model.device)
            ms, spread = step_ms(model, engine, handle, cache, ids, token, steps)
            size, stored = cache_bytes(cache)
            del cache
        peak = peak_bytes(model.device)
    return {
        "engine": engine.name,
        "batch": batch,
        "context": context,
        "stored_tokens": stored,
        "ms_per_step": ms,
        "spread_ms": spread,
        "tokens_per_second": 1e3 * batch / ms,
        "peak_bytes": peak,
        "cache_bytes": size,
        "sequences": "one prompt's cache, repeated" if batch > 1 else "one prompt",
    }


def rows(
    model: torch.nn.Module,
    cases: list[tuple[Engine, int]] | None = None,
    context: int = CONTEXT,
    steps: int = STEPS,
) -> Iterator[dict]:
    """One row an engine and batch."""
    for engine, batch in CASES if cases is None else cases:
        yield {"what": "decode", **measure(model, engine, batch, context, steps)}
