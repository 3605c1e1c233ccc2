# SPDX-License-Identifier: Apache-2.0
"""How much of a model low rank takes, with intervals: rows of lorc_quality.py beside the model as it is, and schedules
beside uniform ranks. Differences are paired: the same continuation, the same record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorc_table import FACTORS, WAYS, cells_of

from uncomp.eval.bootstrap import interval

SEED = 42


def _losses(values: dict[str, Any]) -> list[list[float]]:
    """Nats a token of each continuation; one list, the intervals' only subset."""
    return [values["losses"]]


def _answers(values: dict[str, Any]) -> list[list[float]]:
    """Points of each record, by task in the order of names."""
    tasks: dict[str, list[float]] = {}
    for key, score in sorted(values["longbench_records"].items()):
        tasks.setdefault(key.split("/")[0], []).append(100 * score)
    return list(tasks.values())


MEASURES = (("loss, nats", "losses", _losses, 3), ("LongBench, points", "longbench_records", _answers, 1))


def difference(pairs: Sequence[tuple[list[list[float]], list[list[float]]]], digits: int) -> str:
    """Mean of one less the other over all pairs, and the interval that holds 95 % of its draws.

    Args:
        pairs: numbers of one and of the other, by subset; in each pair the same subsets and records.
    """
    shape = pairs[0][0]
    apart = [
        [sum(one[i][j] - other[i][j] for one, other in pairs) / len(pairs) for j in range(len(shape[i]))]
        for i in range(len(shape))
    ]
    mean = sum(sum(some) / len(some) for some in apart) / len(apart)
    low, high = interval(apart, seed=SEED)
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def lost(rows: Sequence[dict]) -> str:
    """Markdown: every row less the model as it is, each under the same way to keep tokens."""
    base = next((row for row in rows if row["rho"] is None), None)
    if base is None:
        return ""
    known = [
        (f"{name}, {way}", way, key, read, digits)
        for name, key, read, digits in MEASURES
        for way in WAYS
        if key in base.get(way, {})
    ]
    head = ["rho", "schedule", "factors", *(column[0] for column in known)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        if row["rho"] is not None:
            cells = cells_of(row)[:3]
            for _, way, key, read, digits in known:
                there = key in row.get(way, {})
                cells.append(difference([(read(row[way]), read(base[way]))], digits) if there else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def schedules(rows: Sequence[dict]) -> str:
    """Markdown: schedules less uniform ranks, mean over the shares that both were measured at."""
    lines = []
    for factors in FACTORS:
        for schedule in ("cumulative_condition", "linear"):
            cells, shares = [], []
            for _, key, read, digits in MEASURES:
                for way in WAYS:
                    found = {
                        (row["rho"], row["schedule"]): read(row[way])
                        for row in rows
                        if row.get("factors") == factors and row["granularity"] == "head" and key in row.get(way, {})
                    }
                    both = [rho for rho, name in found if name == schedule and (rho, "uniform") in found]
                    pairs = [(found[rho, schedule], found[rho, "uniform"]) for rho in both]
                    cells.append(difference(pairs, digits) if pairs else "")
                    shares = max(shares, sorted(both, reverse=True), key=len)
            if shares:
                lines.append([schedule, factors, ", ".join(f"{rho:g}" for rho in shares), *cells])
    names = [f"{name}, {way}" for name, _, _, _ in MEASURES for way in WAYS]
    keep = [i for i in range(len(names)) if any(line[3 + i] for line in lines)]
    head = ["less uniform", "factors", "rho", *(names[i] for i in keep)]
    text = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    text += ["| " + " | ".join(line[:3] + [line[3 + i] for i in keep]) + " |" for line in lines]
    return "\n".join(text) if lines else ""
