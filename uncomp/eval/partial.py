# SPDX-License-Identifier: Apache-2.0
"""Runs that were stopped before they finished: their records so far, and what a summary would say of the run."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from uncomp.eval.folder import RunFolder

Record = dict[str, Any]


def read(path: Path, about: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Record]]:
    """What of a run is there.

    Args:
        path: the run's folder. about: its run.json.
    Returns:
        a summary with what tables need of it, and records by "subset/id"; a last line that is not whole is left out.
    Raises:
        ValueError: another line that is no record, a run.json of something else.
    """
    try:
        records = RunFolder(path, about["config"]).records()
        return _summary(about, list(records.values())), records
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"uncomp report: {path} holds no run of uncomp eval, or its files were changed") from error


def _summary(about: dict[str, Any], records: list[Record]) -> dict[str, Any]:
    cache = about["config"]["cache"]
    return {
        "task": about["config"]["task"],
        "policy": about["policy"],
        "budget": about["budget"],
        "mode": about["config"]["mode"],
        "window": cache["window"],
        "pool": f"{cache['pool']} {cache['pool_width']}",
        "total": {"n": len(records), "stored": {"share": share(records)}},
    }


def share(records: list[Record]) -> float | None:
    """Stored tokens of a native full cache's, over some records."""
    if not records:
        return None
    if "end" not in records[0]["stored"]:  # continuations of a text
        return fmean(r["stored"]["share"] for r in records)
    full = sum(r["prompt_tokens"] + r["new_tokens"] - 1 for r in records)
    return sum(r["stored"]["end"] for r in records) / full
