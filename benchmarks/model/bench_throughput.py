# SPDX-License-Identifier: Apache-2.0
"""Tokens a second at the largest batch that fits, with the compressed and with the full cache.

The second case is the paper's: prompts of 2048 tokens, 8096 new ones, budget 384. There the full cache is measured at
its mean length, with a batch that fits at its final one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench_decode import measure
from engines import STOCK, Engine, full, ours

STEPS = 32
PROMPT, NEW, PAPER_BUDGET = 2048, 8096, 384
HEADROOM = 6 << 30  # bytes for logits, activations and fragments


def largest(model, tokens: float, factor: float = 1.0) -> int:
    """Sequences of so many stored tokens a head that fit beside the weights; `factor` times their keys and values.

    Votes and positions take 44 bytes a slot.
    """
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    slot = factor * 2 * head * 2 + (44 if factor == 1.0 else 0)
    free = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved(model.device)
    room = free - torch.cuda.memory_allocated(model.device) - HEADROOM
    return int(room / (slot * tokens * config.num_hidden_layers * config.num_key_value_heads))


def cases(model) -> list[tuple[str, Engine, int, int]]:
    """(case, engine, batch, context)."""
    paper = f"prompt {PROMPT}, {NEW} new tokens"
    mean, final = PROMPT + NEW // 2, PROMPT + NEW
    return [
        ("32K", ours(loop=True, compiled=True), min(512, largest(model, 1552)), 32768),
        ("32K", full(), largest(model, 32768 + 512), 32768),
        ("32K", STOCK, largest(model, 32768, 1.1), 32768),  # each layer is copied to append
        (paper, ours(budget=PAPER_BUDGET, groups=2, loop=True, compiled=True), largest(model, PAPER_BUDGET), PROMPT),
        (paper, full(), largest(model, final), mean),
    ]


def rows(model: torch.nn.Module, given: list[tuple[str, Engine, int, int]] | None = None) -> Iterator[dict]:
    """One row a case and engine."""
    for case, engine, batch, context in cases(model) if given is None else given:
        yield {"what": "throughput", "case": case, **measure(model, engine, batch, context, STEPS)}
