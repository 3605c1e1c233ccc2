# SPDX-License-Identifier: Apache-2.0
"""run.py --model: rows of whole models, and the table of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Files of a kind say `from engines import ...`, wherever they are run from.
sys.path += [str(Path(__file__).resolve().parent / folder) for folder in ("model", "kernels")]

KINDS = ("prefill", "decode", "throughput", "memory", "calibrate", "lorc")
_COLUMNS = {  # heading: (key, factor, digits)
    "engine": ("engine", None, 0),
    "B": ("batch", 1, 0),
    "context": ("context", 1, 0),
    "tokens": ("stored_tokens", 1, 0),
    "µs": ("us", 1, 2),
    "ms": ("ms", 1, 2),
    "ms/piece": ("ms_per_piece", 1, 3),
    "once, ms": ("ms_once", 1, 1),
    "of plain": ("ratio", 1, 3),
    "peak of plain": ("peak_ratio", 1, 4),
    "times slower": ("slower", 1, 0),
    "speedup": ("speedup", 1, 2),
    "pruning ms": ("pruning_ms", 1, 2),
    "ms/step": ("ms_per_step", 1, 3),
    "of full width": ("of_full_width", 1, 3),
    "tokens/s": ("tokens_per_second", 1, 0),
    "peak GB": ("peak_bytes", 1e-9, 2),
    "cache GB": ("cache_bytes", 1e-9, 3),
    "by formula GB": ("formula_bytes", 1e-9, 3),
    "positions GB": ("position_bytes", 1e-9, 3),
    "weights GB": ("weights_bytes", 1e-9, 3),
    "held GB": ("held_bytes", 1e-9, 3),
    "named GB": ("named_bytes", 1e-9, 3),
}


def rows(kinds: Sequence[str], model: Any, shared: dict[str, object]) -> Iterator[dict]:
    """Rows of the named kinds, which may name a model of their own; one that fails is a row with its error."""
    for kind in kinds:
        found = importlib.import_module(f"bench_{kind}").rows(model)
        while True:
            try:
                row = next(found)
            except StopIteration:
                break
            except Exception as error:
                text = str(error).strip().split("\n")[0]
                yield {"what": kind, "engine": "", "error": f"{type(error).__name__}: {text}", **shared}
                break
            yield {**shared, **row}


def table(found: Sequence[dict]) -> str:
    """One Markdown table a kind, of the columns that its rows have."""
    text = []
    for kind in dict.fromkeys(row["what"] for row in found):
        mine = [row for row in found if row["what"] == kind]
        columns = {h: c for h, c in _COLUMNS.items() if any(row.get(c[0]) is not None for row in mine)}
        text += ["", f"### {kind}", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        for row in mine:
            text.append("| " + " | ".join(_cell(row, *column) for column in columns.values()) + " |")
            if "error" in row:
                text.append(f"\n{kind}: {row['error']}\n")
    return "\n".join(text).strip()


def _cell(row: dict, key: str, factor: float | None, digits: int) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if factor is None:
        case = row.get("case")
        return f"{value} ({case})" if case else str(value)
    return f"{value * factor:.{digits}f}"
