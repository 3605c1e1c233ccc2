# SPDX-License-Identifier: Apache-2.0
"""Tables of what lorc_quality.py measured, over all its files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WAYS = ("full", "uncomp")
FACTORS = ("whitened", "plain")
_SCHEDULES = ("cumulative_condition", "linear", "uniform")


def merged(files: Sequence[Sequence[dict]]) -> list[dict]:
    """Rows of several files in one order: the model as it is, then by kind of factors, heads, share and schedule.

    Raises:
        ValueError: rows of different models, devices, dtypes or prompts, or one row twice.
    """
    rows = [row for file in files for row in file]
    for name in ("model", "device", "dtype", "commit"):
        if len(known := {row[name] for row in rows}) > 1:
            raise ValueError(f"files of one table must share the {name}; got {', '.join(sorted(map(str, known)))}")
    rows.sort(key=_place)
    places = [_place(row) for row in rows]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"files of one table must hold a row once; twice: {twice}")
    return rows


def _place(row: dict) -> tuple:
    if row["rho"] is None:
        return (-1,)
    return (
        FACTORS.index(row["factors"]),
        row["granularity"],
        -row["rho"],
        _SCHEDULES.index(row["schedule"]),
    )


def cells_of(row: dict) -> list[str]:
    """rho, schedule, factors and channels kept of a row."""
    if row["rho"] is None:
        return ["as it is", "", "", "100 %"]
    kind = row["factors"] + ("" if row["granularity"] == "head" else f", {row['granularity']}")
    return [f"{row['rho']:g}", row["schedule"], kind, f"{100 * row['kept_share']:.1f} %"]


def _bytes(row: dict, way: str, whole: int | None) -> str:
    held = row.get(way, {}).get("kv_bytes")
    return f"{100 * held / whole:.1f} %" if held is not None and whole else ""


def table(found: Sequence[dict]) -> str:
    """Markdown, a column for each number that any row has; bytes are keys and values behind a prefix, over those of
    the full cache of the model as it is."""
    whole = next((row["full"].get("kv_bytes") for row in found if row["rho"] is None and "full" in row), None)
    columns: list[tuple[str, Any]] = []
    for name, key, show in (
        ("perplexity", "perplexity", lambda values: f"{values['perplexity']:.2f}"),
        ("needles", "found", lambda values: f"{values['found']} of {values['needles']}"),
        ("LongBench", "longbench", lambda values: f"{values['longbench']:.1f}"),
    ):
        for way in WAYS:
            if any(key in row.get(way, {}) for row in found):
                columns.append(
                    (f"{name}, {way}", lambda row, w=way, k=key, s=show: s(row[w]) if k in row.get(w, {}) else "")
                )
    for way in WAYS:
        if whole is not None and any("kv_bytes" in row.get(way, {}) for row in found):
            columns.append((f"bytes, {way}", lambda row, w=way: _bytes(row, w, whole)))
    head = ["rho", "schedule", "factors", "channels kept", *(name for name, _ in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in found:
        lines.append("| " + " | ".join(cells_of(row) + [cell(row) for _, cell in columns]) + " |")
    return "\n".join(lines)
