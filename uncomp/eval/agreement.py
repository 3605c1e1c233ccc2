# SPDX-License-Identifier: Apache-2.0
"""How far a run says what the full cache says. docs/evaluation.md "Agreement"."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch

from uncomp.config import UncompConfig
from uncomp.eval.metrics import qa_f1
from uncomp.eval.perplexity import score


def agreement(tokens: Sequence[int], text: str, full_tokens: Sequence[int], full_text: str) -> dict[str, float]:
    """Compares new tokens and text with those of the full cache.

    Returns:
        exact: 1 if all new ids are equal; prefix: common leading ids over the longer length; f1: qa_f1 of the texts,
        1 where both are the same.
    """
    leading = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, full_tokens, strict=False)))
    longer = max(len(tokens), len(full_tokens))
    return {
        "exact": float(list(tokens) == list(full_tokens)),
        "prefix": leading / longer if longer else 1.0,
        "f1": 1.0 if text == full_text else qa_f1(text, full_text),
    }


def teacher_forced(
    model: torch.nn.Module, prompt: Sequence[int], full_tokens: Sequence[int], config: UncompConfig
) -> dict[str, float]:
    """Feeds the full cache's new tokens to both caches, one at a time, and compares what each would say next.

    Args:
        model: not patched. prompt: its ids, compressed as a whole. full_tokens: what the full cache generated.
    Returns:
        argmax: share of places where both caches have the same most likely token; kl: mean KL(full || policy), nats;
        nothing where the full cache gave fewer than two tokens. Cost: two more prefills and two passes of steps.
    """
    if len(full_tokens) < 2:
        return {}
    prefix, continuation = torch.tensor([list(prompt)]), torch.tensor([list(full_tokens)])
    full = score(model, prefix, continuation, None)
    mine = score(model, prefix, continuation, config)
    kl, equal = mine.against(full)
    return {"argmax": equal, "kl": kl}
