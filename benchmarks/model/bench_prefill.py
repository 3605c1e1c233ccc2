# SPDX-License-Identifier: Apache-2.0
"""Prefill: time, most memory, and bytes that stay.

The stock model, our full cache, a compressed one, and that behind a prompt that loses tokens between stages of layers
(2, 13, 11, 5 and 1 of 32). Batches hold prompts of different lengths.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from engines import STOCK, Engine, cache_bytes, clean, ours, peak_bytes, running, synchronize
from torch import Tensor

from uncomp.pruning import PUBLISHED, PrunedPrompt

CONTEXTS, BATCHED = (8192, 32768, 131072), (8192, 32768)
SHARES = (1.0, 0.75, 0.5, 0.25)  # lengths in a batch, of the longest prompt
RUNS, LONG = 3, 65536  # prefills that count; one of prompts longer than this, which take many seconds
WITHOUT = Engine("uncomp, full cache", {"policy": "full", "max_new_tokens": 16})


def starts(layers: int) -> list[int]:
    """The published stages of 32 layers; in proportion, for other models."""
    return sorted({start * layers // 32 for start in PUBLISHED[32]})


def pruned(engine: Engine, layers: int, **options) -> Engine:
    """An engine whose prompts lose tokens, from all of them in the first stage to 1536 in the last."""
    prefill = {"stages": starts(layers), **options}
    return replace(engine, name=f"{engine.name}, pruned", config={**engine.config, "prefill": prefill})


def prompts(model: torch.nn.Module, context: int, shares: tuple[float, ...]) -> dict[str, Tensor]:
    """Random ids of prompts, padded on the left."""
    ids = torch.randint(3, model.config.vocab_size, (len(shares), context), device=model.device)
    if set(shares) == {1.0}:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for row, share in enumerate(shares):
        mask[row, : context - int(share * context)] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def measure(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict:
    """Median and spread over prefills behind one that is not counted; most memory of the counted ones."""
    times = []
    clean(model.device)
    runs = RUNS if inputs["input_ids"].shape[1] <= LONG else 1
    for run in range(1 + runs):
        out = None
        if run == 1:  # memory that the first one left is used again, as by a program that goes on
            reset_peak(model.device)
        synchronize(model.device)
        begin = time.perf_counter()
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        synchronize(model.device)
        times.append(1e3 * (time.perf_counter() - begin))
    size, stored = cache_bytes(out.past_key_values)
    return {
        "stored_tokens": stored,
        "ms": statistics.median(times[1:]),
        "spread_ms": max(times[1:]) - min(times[1:]),
        "runs": runs,
        "peak_bytes": peak_bytes(model.device),
        "cache_bytes": size,
    }


def reset_peak(device: torch.device) -> None:
    """The most memory is counted from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def pruning_clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """Milliseconds that scoring, choosing and gathering of tokens take on the device, of prefills inside."""
    marks: list[tuple] = []

    def now():
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(function):
        def call(*args):
            begin = now()
            result = function(*args)
            marks.append((begin, now()))
            return result

        return call

    def total() -> float:
        synchronize(device)
        return sum(a.elapsed_time(b) if device.type == "cuda" else 1e3 * (b - a) for a, b in marks)

    before = PrunedPrompt.score, PrunedPrompt.enter
    PrunedPrompt.score, PrunedPrompt.enter = map(timed, before)
    try:
        yield total
    finally:
        PrunedPrompt.score, PrunedPrompt.enter = before


def rows(
    model: torch.nn.Module,
    contexts: tuple[int, ...] = CONTEXTS,
    engine: Engine | None = None,
    batched: tuple[int, ...] = BATCHED,
    **options,
) -> Iterator[dict]:
    """One row an engine, context and batch.

    Rows of a pruned engine have `speedup`, the milliseconds of the same engine without over its own, and `pruning_ms`,
    what scoring, choosing and gathering take of them.

    Args:
        engine: ours, with a compressed cache. batched: contexts of batches. options: of PrefillPruning.
    """
    base = engine or ours()
    thin = pruned(base, model.config.num_hidden_layers, **options)
    cases = [(context, (1.0,), (STOCK, WITHOUT, base, thin)) for context in contexts]
    cases += [(context, SHARES, (base, thin)) for context in batched]
    for context, shares, engines in cases:
        inputs, ms = prompts(model, context, shares), None
        for each in engines:
            with running(model, each):
                found = measure(model, inputs)
                if each is thin:
                    found["speedup"] = ms / found["ms"]
                    with pruning_clock(model.device) as spent, torch.no_grad():
                        model(**inputs, use_cache=True, logits_to_keep=1)
                        found["pruning_ms"] = spent()
            ms = found["ms"]
            what = {"what": "prefill", "engine": each.name, "batch": len(shares), "context": context}
            if len(shares) > 1:
                what["case"] = "lengths " + ", ".join(str(int(share * context)) for share in shares)
            yield {**what, **found}
