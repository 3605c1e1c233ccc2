# SPDX-License-Identifier: Apache-2.0
"""What keys and values of half the width bring: attention alone, decode steps of a whole model at 32K tokens, bytes.

Attention over latents is timed beside full width in the same run. The model is compressed for the second half of its
rows and comes back as it was.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence

import harness
import torch
from bench_decode import CONTEXT, STEPS, measure
from bench_memory import allocated
from engines import Engine, clean, full, ours, peak_bytes, synchronize

import uncomp
from uncomp import lorc

# Tokens of a row, of 8 rows with 128 channels or 64.
LENGTHS = (("decode_attention", (16384, 32768, 131072)), ("decode_evict_", (1552,)))
FULL = "full width"


def rows(
    model: torch.nn.Module, engines: tuple[Engine, ...] | None = None, context: int = CONTEXT, steps: int = STEPS
) -> Iterator[dict]:
    """On a GPU rows of attention; then at full width and at half of it one of bytes and one an engine, and between
    them one of `compress`, whose peak counts the weights."""
    engines = engines or (full(compiled=False), ours(loop=True))
    device, text = model.device, model.config.get_text_config(decoder=True)
    if device.type == "cuda":
        yield from kernel_rows()
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    wide = {"what": "lorc", "case": f"width {dim}"}
    yield {**wide, **held(model, context, [2 * dim] * text.num_hidden_layers)}
    full_width: dict[str, float] = {}
    for engine in engines:
        row = measure(model, engine, 1, context, steps)
        full_width[engine.name] = row["ms_per_step"]
        yield {**wide, **row}
    clean(device)
    synchronize(device)
    before, begin = allocated(device), time.perf_counter()
    narrow = {"what": "lorc", "case": f"ranks {dim // 2}"}
    with lorc.compress(model, lorc.LorcConfig(rank_k=dim // 2, rank_v=dim // 2)) as handle:
        synchronize(device)
        stats = handle.stats()
        yield {
            **narrow,
            "engine": "uncomp.lorc.compress",
            "ms": 1e3 * (time.perf_counter() - begin),
            "allocated_before_bytes": before,
            "peak_bytes": peak_bytes(device),
            "projections_bytes": [stats["weight_bytes_before"], stats["weight_bytes_after"]],
        }
        widths = [key + value for key, value in zip(stats["rank_k"], stats["rank_v"], strict=True)]
        yield {**narrow, **held(model, context, widths)}
        for engine in engines:
            row = measure(model, engine, 1, context, steps)
            yield {**narrow, **row, "of_full_width": row["ms_per_step"] / full_width[engine.name]}


def held(model: torch.nn.Module, context: int, widths: Sequence[int]) -> dict:
    """Bytes of a full cache behind a prompt, and of the weights.

    formula_bytes is what widths say: r_K + r_V numbers for each slot of a row; positions are 4 bytes a slot besides.

    Args:
        widths: of each layer, numbers of a token and KV head: r_K + r_V, or twice the head dim.
    """
    clean(model.device)
    before = allocated(model.device)
    ids = torch.randint(3, model.config.vocab_size, (1, context), device=model.device)
    with uncomp.patch(model, uncomp.UncompConfig(policy="full", max_new_tokens=1)), torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        layers = [layer.ragged for layer in cache.uncomp.layers]
        clean(model.device)
        after = allocated(model.device)
    return {
        "engine": "bytes of a full cache",
        "context": context,
        "slots": layers[0].capacity // layers[0].rows,
        "cache_bytes": sum(layer.kv_bytes for layer in layers),
        "formula_bytes": sum(
            model.dtype.itemsize * wide * layer.capacity for wide, layer in zip(widths, layers, strict=True)
        ),
        "position_bytes": sum(layer.slot_position.numel() * layer.slot_position.element_size() for layer in layers),
        "state_bytes": sum(layer.state_bytes for layer in layers),
        "held_bytes": None if after is None else after - before,
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def kernel_rows(
    lengths: Sequence[tuple[str, Sequence[int]]] = LENGTHS, plan: harness.Plan | None = None
) -> Iterator[dict]:
    """Attention of one layer over latents, and over keys and values of full width, one row each; microseconds."""
    plan = plan or harness.Plan(groups=6, seconds=0.1)
    for op, numbers in lengths:
        bench = importlib.import_module(f"bench_{op.rstrip('_')}")
        for length in numbers:
            case = bench.latent_case(length)
            whole = harness.time_entry(case.rivals[FULL], case.bytes, plan)
            ours = harness.time_entry(case.ours, case.bytes, plan)
            for name, timing in ((FULL, whole), (f"latents of {bench.RANK}", ours)):
                row = {"what": "lorc attention", "engine": op, "case": f"8x{length}, {name}", "us": timing.median_us}
                row |= {"spread_us": timing.spread_us}
                if timing.error is not None:
                    row["error"] = timing.error
                elif timing is ours and whole.median_us:
                    row["of_full_width"] = timing.median_us / whole.median_us
                yield row
