# SPDX-License-Identifier: Apache-2.0
"""What keys and values of half the width bring at 32K tokens: decode steps, bytes of the cache, and the compression.

The model is compressed for the second half of the rows and comes back as it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from bench_decode import CONTEXT, STEPS, measure
from bench_memory import allocated
from engines import Engine, clean, full, ours, peak_bytes, synchronize

from uncomp import lorc


def rows(
    model: torch.nn.Module, engines: tuple[Engine, ...] | None = None, context: int = CONTEXT, steps: int = STEPS
) -> Iterator[dict]:
    """One row an engine at full width, one of compress (its peak with the weights), one an engine at half the width."""
    engines = engines or (full(compiled=False), ours(loop=True), ours(loop=True, compiled=True))
    device, text = model.device, model.config.get_text_config(decoder=True)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for engine in engines:
        yield {"what": "lorc", "case": f"width {dim}", **measure(model, engine, 1, context, steps)}
    clean(device)
    synchronize(device)
    before, begin = allocated(device), time.perf_counter()
    with lorc.compress(model, lorc.LorcConfig(rank_k=dim // 2, rank_v=dim // 2)) as handle:
        synchronize(device)
        stats = handle.stats()
        yield {
            "what": "lorc",
            "engine": "uncomp.lorc.compress",
            "case": f"ranks {dim // 2}",
            "ms": 1e3 * (time.perf_counter() - begin),
            "weights_bytes": before,
            "peak_bytes": peak_bytes(device),
            "projections_bytes": [stats["weight_bytes_before"], stats["weight_bytes_after"]],
        }
        for engine in engines:
            yield {"what": "lorc", "case": f"ranks {dim // 2}", **measure(model, engine, 1, context, steps)}
