# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of one long prompt go: peak of the prefill, what stays, and how much of that `stats()` names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from engines import BUDGET, STOCK, Engine, cache_bytes, clean, ours, peak_bytes, running

CONTEXT, NEW = 32768, 16
OTHERS = tuple(Engine(f"uncomp, policy {name}", {"policy": name, "budget": BUDGET}) for name in ("snapkv", "adakv"))


def allocated(device: torch.device) -> int | None:
    """Bytes that torch holds for tensors; None on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def rows(model: torch.nn.Module, engines: tuple[Engine, ...] | None = None, context: int = CONTEXT) -> Iterator[dict]:
    """One row an engine: a prefill, then `generate` of a few tokens.

    held_bytes is what a request leaves allocated beside the weights, named_bytes what stats() says of it.
    """
    for engine in engines or (STOCK, ours(), *OTHERS):
        clean(model.device)
        before = allocated(model.device)
        ids = torch.randint(3, model.config.vocab_size, (1, context), device=model.device)
        with running(model, engine) as handle:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                return_dict_in_generate=True,
            )
            peak, held = peak_bytes(model.device), allocated(model.device)
            size, stored = cache_bytes(out.past_key_values)
            stats = handle.stats() if handle is not None else {}
            yield {
                "what": "memory",
                "engine": engine.name,
                "batch": 1,
                "context": context,
                "stored_tokens": stored,
                "peak_bytes": peak,
                "weights_bytes": before,
                "cache_bytes": size,
                "state_bytes": stats.get("state_bytes", 0),
                "graph_bytes": stats.get("graph_bytes", 0),
                "held_bytes": None if held is None else held - before,
                "named_bytes": size + stats.get("state_bytes", 0) + stats.get("graph_bytes", 0),
            }
            del out
