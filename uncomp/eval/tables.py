# SPDX-License-Identifier: Apache-2.0
"""Finished runs as rows that may be compared: same prompts, same records, stored tokens beside every score.

Source: docs/evaluation.md "Tables".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from uncomp.eval.bootstrap import interval
from uncomp.eval.finished import Finished, at
from uncomp.eval.partial import share
from uncomp.eval.runs import STANDARD

EQUAL = 0.01  # stored tokens may differ by this share


@dataclass
class Row:
    """A policy at a budget, over one run or several that differ in their seed."""

    label: str
    budget: int | float | None
    runs: list[Finished]
    score: float = 0.0
    spread: float | None = None  # standard deviation over seeds
    bounds: tuple[float, float] = (0.0, 0.0)
    to_full: tuple[float, float, float] | None = None  # difference, low, high
    to_uncomp: tuple[float, float, float] | None = None
    subsets: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # all of a record's scores by name, 0 to 100
    figures: dict[str, float | None] = field(default_factory=dict)
    equal: bool = True  # stores what the row it is compared with stores, within 1 %


@dataclass
class Table:
    """Rows of one task, question mode and way of building prompts."""

    task: str
    mode: str
    config: dict[str, Any]
    rows: list[Row]
    keys: frozenset[str]  # records that all rows have
    left: int  # records that some rows have and others not
    missing: list[tuple[str, Any]]  # policy, budget
    few: list[Finished] = field(default_factory=list)  # stopped runs with too few records to compare
    shared: dict[str, Any] = field(default_factory=dict)  # one setting for all policies, by name

    @property
    def counts(self) -> dict[str, int]:
        """Records of each subset that all rows have."""
        found = dict.fromkeys(self.rows[0].subsets, 0)
        for key in self.keys:
            found[self.rows[0].runs[0].records[key]["subset"]] += 1
        return found

    @property
    def stopped(self) -> int:
        """Runs among the rows that were stopped before they finished."""
        return sum(not run.whole for row in self.rows for run in row.runs)

    @property
    def cut(self) -> int:
        """Records whose prompts were longer than the model or --max-prompt takes; all rows have the same prompts."""
        records = self.rows[0].runs[0].records
        return sum(bool(records[key].get("cut_tokens")) for key in self.keys)

    @property
    def count(self) -> int:
        """Records that all rows have."""
        return len(self.keys)

    @property
    def lower_is_better(self) -> bool:
        """Perplexity; scores otherwise."""
        return self.task == "perplexity"

    def budgets(self) -> list[Any]:
        """Of the rows but full, tokens before shares, the largest first."""
        found = {row.budget for row in self.rows if row.budget is not None}
        return sorted(found, key=lambda b: (isinstance(b, float), -b))

    def at(self, budget: Any) -> list[Row]:
        """Rows of a budget."""
        return [row for row in self.rows if row.budget == budget]

    def row(self, label: str, budget: Any) -> Row | None:
        """One row."""
        return next((row for row in self.at(budget) if row.label == label), None)


def make(runs: Iterable[Finished], *, seed: int) -> list[Table]:
    """Tables of comparable runs, by task and mode.

    Args:
        seed: of the bootstrap.
    Raises:
        ValueError: a run twice, runs of one row that differ in more than their seed, runs without a common record.
    """
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(run.table, []).append(run)
    alike = (part for group in groups.values() for part in _by_settings(group))
    tables = [_table(some, seed) for part in alike for some in _by_weights(part)]
    return sorted(tables, key=lambda t: (t.task, t.mode, json.dumps([t.config, t.shared], sort_keys=True)))


def _by_settings(runs: list[Finished]) -> list[list[Finished]]:
    """Runs with one setting for all policies each; the full cache, which takes none, stands in every table."""
    full: dict[str, list[Finished]] = {}
    found: dict[str, list[Finished]] = {}
    for run in runs:
        kind = full if run.summary["budget"] is None else found
        kind.setdefault(json.dumps(run.shared, sort_keys=True), []).append(run)
    any_full = next(iter(full.values()), [])
    return [[*full.get(key, any_full), *some] for key, some in found.items()] or [any_full]


def _by_weights(runs: list[Finished]) -> list[list[Finished]]:
    """Runs of one model each; together where no two tell that their models differ."""
    found: dict[str | None, list[Finished]] = {}
    for run in runs:
        found.setdefault(run.weights, []).append(run)
    return list(found.values()) if len(found.keys() - {None}) > 1 else [runs]


def _table(runs: list[Finished], seed: int) -> Table:
    by_row: dict[tuple[str, Any], list[Finished]] = {}
    least = _least(runs)
    few = [run for run in runs if not run.whole and len(run.records) < least]
    runs = [run for run in runs if run not in few]
    for run in runs:
        beside = by_row.setdefault((run.label, run.summary["budget"]), [])
        for other in beside:
            if other.about["config"] == run.about["config"]:
                raise ValueError(f"uncomp report: {other.path} and {run.path} are one run twice; name one of them")
            _check_seeds(other, run)
        beside.append(run)
    every = [set(run.records) for run in runs]
    common = set.intersection(*every)
    if not common:
        raise ValueError(f"uncomp report: {runs[0].path} and the runs beside it have no record in common")
    keys = [key for key in runs[0].records if key in common]
    task = runs[0].summary["task"]
    rows = [_row(label, budget, some, keys, task, seed) for (label, budget), some in by_row.items()]
    rows.sort(key=lambda row: (row.label != "full", _order(row.label), row.label))
    config = {name: value for name, value in runs[0].about["config"].items() if name != "cache"}
    table = Table(
        task, runs[0].summary["mode"], config, rows, frozenset(keys), len(set.union(*every)) - len(keys), [], few
    )
    table.shared = next((run.shared for run in runs if run.summary["budget"] is not None), {})
    _compare(table, keys, seed)
    for budget in table.budgets():
        table.missing += [(name, budget) for name in STANDARD if name != "full" and table.row(name, budget) is None]
    if table.row("full", None) is None:
        table.missing.insert(0, ("full", None))
    return table


def _check_seeds(one: Finished, other: Finished) -> None:
    """Raises ValueError where runs of one row are no seeds of one configuration."""
    a, b = one.about["config"]["cache"], other.about["config"]["cache"]
    name = next((name for name in a if name != "seed" and a[name] != b.get(name, a[name])), None)
    if name is not None:
        raise ValueError(
            f"uncomp report: {one.path} and {other.path} may differ in their seed alone, to be one row; {name} is "
            f"{a[name]!r} and {b[name]!r}"
        )


def _least(runs: Sequence[Finished]) -> int:
    """Records that a stopped run needs to be compared: a table of most cells, rows times records, is wanted."""

    def cells(least: int) -> tuple[int, int]:
        kept = [set(run.records) for run in runs if run.whole or len(run.records) >= least]
        return (len(kept) * len(set.intersection(*kept)), len(kept)) if kept else (0, 0)

    return max({0, *(len(run.records) for run in runs)}, key=cells)


def _order(label: str) -> int:
    return STANDARD.index(label) if label in STANDARD else len(STANDARD)


def value_of(record: dict[str, Any], task: str) -> float:
    """What is averaged: 100 times the first score, or the loss of a continuation."""
    first = next(iter(record["score"].values()))
    return first if task == "perplexity" else 100 * first


def _by_subset(row: Row, keys: Sequence[str], task: str) -> dict[str, list[float]]:
    """Values of the records of each subset, the mean over the seeds."""
    found: dict[str, list[float]] = {}
    for key in keys:
        values = [value_of(run.records[key], task) for run in row.runs]
        found.setdefault(row.runs[0].records[key]["subset"], []).append(fmean(values))
    return found


def _shown(value: float, task: str) -> float:
    if task != "perplexity":
        return value
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _row(label: str, budget: Any, runs: list[Finished], keys: list[str], task: str, seed: int) -> Row:
    row = Row(label, budget, runs)
    subsets = _by_subset(row, keys, task)
    row.score = _shown(fmean(map(fmean, subsets.values())), task)
    if len(runs) > 1:
        single = [_by_subset(Row(label, budget, [run]), keys, task) for run in runs]
        row.spread = stdev(_shown(fmean(map(fmean, values.values())), task) for values in single)
    low, high = interval(list(subsets.values()), seed=seed)
    row.bounds = (_shown(low, task), _shown(high, task))
    row.subsets = {name: _shown(fmean(values), task) for name, values in subsets.items()}
    records = [run.records[key] for run in runs for key in keys]

    def mean(*path: str, of: Sequence[dict[str, Any]] = records) -> float | None:
        found = [value for record in of if (value := at(record, path)) is not None]
        return fmean(found) if found else None

    if task != "perplexity":
        row.metrics = {name: 100 * (mean("score", name) or 0.0) for name in records[0]["score"]}
    stored = mean("stored", "end")
    kept_in = ("score",) if task == "perplexity" else ("agreement",)
    steady = [r for r in records if not r.get("warmup")] or records
    row.figures = {
        "stored_prefill": mean("stored", "mean"),
        "stored": mean("stored", "mean") if stored is None else stored,
        "share": share(records),
        "kv_bytes": mean("bytes", "kv"),
        "allocated_bytes": mean("bytes", "allocated"),
        "prefill_seconds": mean("seconds", "prefill", of=steady),
        "tokens_per_second": _rate(steady) if "new_tokens" in records[0] else None,
        "agreement": mean("agreement", "prefix"),
        "evicted_answer": mean("evicted_answer"),
        "head_consensus": mean("head_consensus"),
        "kl": mean(*kept_in, "kl"),
        "equal_argmax": mean("score", "equal_argmax") if task == "perplexity" else mean("agreement", "argmax"),
        "uncompressed": float(sum(bool(r.get("uncompressed")) for r in records)),
    }
    return row


def _rate(records: list[dict[str, Any]]) -> float | None:
    seconds = sum(r["seconds"]["decode"] for r in records)
    tokens = sum(r["new_tokens"] - 1 for r in records)
    return tokens / seconds if seconds > 0 and tokens > 0 else None


def _compare(table: Table, keys: list[str], seed: int) -> None:
    full = table.row("full", None)
    for row in table.rows:
        if row.budget is None:
            continue
        base = table.row("uncomp", row.budget) or table.at(row.budget)[0]
        stored, wanted = row.figures["stored"], base.figures["stored"]
        row.equal = abs(stored - wanted) <= EQUAL * wanted
        if full is not None:
            row.to_full = _difference(row, full, keys, table.task, seed)
        if row is not base and base.label == "uncomp":
            row.to_uncomp = _difference(row, base, keys, table.task, seed)


def _difference(row: Row, base: Row, keys: list[str], task: str, seed: int) -> tuple[float, float, float]:
    """Difference of the scores with its paired bounds; for losses the ratio of perplexities."""
    mine, theirs = _by_subset(row, keys, task), _by_subset(base, keys, task)
    apart = [[a - b for a, b in zip(mine[name], theirs[name], strict=True)] for name in mine]
    low, high = interval(apart, seed=seed)
    return tuple(_shown(value, task) for value in (fmean(map(fmean, apart)), low, high))
