# SPDX-License-Identifier: Apache-2.0
"""How far a run says what the full cache says. docs/evaluation.md "Agreement"."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from uncomp.eval.metrics import qa_f1


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
