# SPDX-License-Identifier: Apache-2.0
"""The summary of one run, from its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from uncomp.eval.effort import Effort
from uncomp.eval.runs import Run

Records = Sequence[dict[str, Any]]


def of_run(run: Run, records: Records, *, skipped: int, effort: Effort) -> dict[str, Any]:
    """Plain values of summary.json.

    Args:
        records: of a finished run, in order. skipped: examples that were left out.
        effort: what this call spent, over all processes.
    """
    subsets = {name: of_records(part) for name, part in by_subset(records).items()}
    return {
        "task": records[0]["task"] if records else None,
        **run.settings(),
        "batch_size": max((r["batch"]["size"] for r in records), default=0),
        "score": average(subsets.values()),
        "subsets": subsets,
        "total": of_records(records) if records else {"n": 0},
        "skipped": skipped,
        "peak_bytes": effort.peak or None,
        "call": effort.to_dict(),
    }


def by_subset(records: Records) -> dict[str, list[dict[str, Any]]]:
    """Records of each subset, in order; LongBench-E has its buckets of length as further subsets."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["subset"], []).append(record)
    return found


def first_score(record: dict[str, Any]) -> float:
    """The score that counts, 0 to 1."""
    return next(iter(record["score"].values()))


def average(subsets: Iterable[dict[str, Any]]) -> float | None:
    """Plain mean of the subsets' scores."""
    scores = [s["score"] for s in subsets if s["score"] is not None]
    return round(fmean(scores), 2) if scores else None


def of_records(records: Records) -> dict[str, Any]:
    """Means and totals of some records; scores and shares in per cent."""

    def mean(value: Callable[[dict[str, Any]], Any], digits: int = 2, factor: float = 1.0) -> float | None:
        found = [v for v in map(value, records) if v is not None]
        return round(factor * fmean(found), digits) if found else None

    steady = [r for r in records if not r["warmup"]] or records
    decode = sum(r["seconds"]["decode"] for r in steady)
    tokens = sum(r["new_tokens"] - 1 for r in steady)
    full_tokens = [r["prompt_tokens"] + r["new_tokens"] - 1 for r in records]
    buckets = sorted({r["details"]["bucket"] for r in records if "bucket" in r["details"]})
    made: dict[str, Any] = {
        "n": len(records),
        "score": mean(first_score, 2, 100),
        "scores": {name: mean(lambda r, n=name: r["score"].get(n), 2, 100) for name in records[0]["score"]},
        "stored": {
            "prefill": mean(lambda r: r["stored"]["mean"]),
            "end": mean(lambda r: r["stored"]["end"]),
            "share": round(sum(r["stored"]["end"] for r in records) / sum(full_tokens), 5),
        },
        "bytes": {
            "kv": mean(lambda r: r["bytes"]["kv"], 0),
            "allocated": mean(lambda r: r["bytes"]["allocated"], 0),
            "share": round(sum(r["bytes"]["kv"] for r in records) / sum(r["bytes"]["full"] for r in records), 5),
        },
        "prefill_seconds": round(fmean(r["seconds"]["prefill"] for r in steady), 5),
        "decode_seconds": round(fmean(r["seconds"]["decode"] for r in steady), 5),
        "tokens_per_second": round(tokens / decode, 2) if decode > 0 and tokens > 0 else None,
        "prompt_tokens": mean(lambda r: r["prompt_tokens"]),
        "cut": sum(r["cut_tokens"] > 0 for r in records),
        "uncompressed": sum(r["uncompressed"] for r in records),
        "guesses": sum(bool(r.get("guessed")) for r in records),
        "evicted_answer": mean(lambda r: r.get("evicted_answer"), 4),
        "head_consensus": mean(lambda r: r.get("head_consensus"), 4),
    }
    if any("agreement" in r for r in records):
        made["agreement"] = {
            name: mean(lambda r, n=name: r.get("agreement", {}).get(n), 4)
            for name in ("exact", "prefix", "f1", "argmax", "kl")
        }
    if buckets:
        made["buckets"] = {
            name: {"n": len(some), "score": round(100 * fmean(map(first_score, some)), 2) if some else None}
            for name in ("0-4k", "4-8k", "8k+")
            for some in [[r for r in records if r["details"].get("bucket") == name]]
        }
    return made
