# SPDX-License-Identifier: Apache-2.0
"""Tables of finished runs as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from uncomp.eval.finished import Finished
from uncomp.eval.tables import Row, Table, value_of
from uncomp.eval.tasks.longbench import BUCKETS

DASH = "\u2013"  # where there is no value; never 0
FIGURES = (
    "stored_prefill",
    "stored",
    "share",
    "kv_bytes",
    "allocated_bytes",
    "prefill_seconds",
    "tokens_per_second",
    "agreement",
    "evicted_answer",
    "head_consensus",
    "kl",
    "equal_argmax",
    "uncompressed",
)


def to_json(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Plain values of every table."""
    return [
        {
            "task": table.task,
            "mode": table.mode,
            "config": table.config,
            "one_setting": table.shared,
            "records": table.count,
            "records_by_subset": table.counts,
            "records_not_in_all": table.left,
            "records_cut": table.cut,
            "stopped_runs": table.stopped,
            "too_few_records": [_name(run) for run in table.few],
            "missing": [{"policy": name, "budget": budget} for name, budget in table.missing],
            "rows": [_values(table, row) for row in table.rows],
        }
        for table in tables
    ]


def _name(run: Finished) -> str:
    budget = "" if run.summary["budget"] is None else f" {run.summary['budget']}"
    return f"{run.summary['policy']}{budget} ({len(run.records)})"


def _values(table: Table, row: Row) -> dict[str, Any]:
    return {
        "policy": row.label,
        "budget": row.budget,
        "runs": len(row.runs),
        "score": row.score,
        "score_low": row.bounds[0],
        "score_high": row.bounds[1],
        "score_spread": row.spread,
        "to_full": row.to_full,
        "to_uncomp": row.to_uncomp,
        "no_difference_to_uncomp": None if row.to_uncomp is None else _none(table, row.to_uncomp),
        "equal_stored": row.equal,
        "window": row.runs[0].summary["window"],
        "pool": row.runs[0].summary["pool"],
        **row.figures,
        "metrics": row.metrics,
        "subsets": row.subsets,
    }


def to_csv(tables: Sequence[Table]) -> str:
    """One line for each subset of each row, and one for all of them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["score_low", "score_high", "score_spread", "equal_stored", "window", "pool", *FIGURES]
    pairs = ["to_full", "to_full_low", "to_full_high", "to_uncomp", "to_uncomp_low", "to_uncomp_high"]
    writer.writerow(["task", "mode", "policy", "budget", "subset", "records", "score", *names, *pairs])
    for table in tables:
        for row in table.rows:
            values = _values(table, row)
            apart = [*(row.to_full or [None] * 3), *(row.to_uncomp or [None] * 3)]
            head = [table.task, table.mode, row.label, row.budget]
            writer.writerow([*head, "all", table.count, row.score, *(values[name] for name in names), *apart])
            for subset, score in row.subsets.items():
                writer.writerow([*head, subset, table.counts[subset], score, *[None] * (len(names) + len(pairs))])
    return out.getvalue()


def _none(table: Table, apart: tuple[float, float, float]) -> bool:
    """Whether an interval holds no difference: 0, or for perplexities the ratio 1."""
    nothing = 1.0 if table.lower_is_better else 0.0
    return apart[1] <= nothing <= apart[2]


# ---- Markdown
def to_markdown(tables: Sequence[Table], unfinished: Sequence[Path] = ()) -> str:
    """One section a table, one block of rows a budget."""
    lines = ["# Evaluation", ""]
    for table in tables:
        lines += _section(table)
    for path in unfinished:
        lines.append(f"Not finished, so not in a table: {path}")
    return "\n".join(lines).rstrip() + "\n"


def _section(table: Table) -> list[str]:
    config = table.config
    what = "perplexity of the continuation, lower is better" if table.lower_is_better else "score, 0 to 100"
    many = [run for row in table.rows for run in row.runs]
    lines = [f"## {table.task}, question-{table.mode}", ""]
    devices = sorted({f"{run.about['model']} on {run.about['device']}" for run in many})
    decode = f"decode={many[0].about['config']['cache']['decode']}"
    lines.append(f"{'; '.join(devices)}; {config['dtype']}; {decode}; {table.count} records; {what}.")
    if table.shared:
        lines.append(f"One setting for all: {', '.join(f'{name} {value}' for name, value in table.shared.items())}.")
    if table.left:
        lines.append(f"{table.left} records are not in all rows and are left out.")
    if table.cut:
        most = config.get("max_prompt")
        room = "the model takes beside the new tokens" if most is None else f"{most} tokens"
        lines.append(f"{table.cut} prompts were longer than {room} and were cut in the middle.")
    if table.stopped:
        lines.append(f"{table.stopped} runs were stopped before they finished.")
    if table.few:
        named = ", ".join(map(_name, table.few))
        lines.append(f"Left out, because they were stopped after few records: {named}.")
    lines.append("")
    subsets = list(table.rows[0].subsets)
    shown = subsets if 1 < len(subsets) <= 20 else []
    ppl = table.lower_is_better
    extra = ["KL", "equal argmax"] if ppl else ["agreement", "answer evicted", "consensus"]
    head = ["policy", "budget", *shown, "average" if shown else "score", "95 %", "to full", "to uncomp"]
    head += _further(table)
    head += ["stored", "share", "MiB", "prefill s", "tokens/s", *extra]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    if shown:
        cells = [str(table.counts[name]) for name in shown] + [str(table.count)]
        lines.append(f"| records | | {' | '.join(cells)} |" + " |" * (len(head) - 3 - len(shown)))
    full = table.row("full", None)
    if full is not None:
        lines.append(_line(table, full, shown, set()))
    for budget in table.budgets():
        rows = table.at(budget)
        best = _best(table, rows, shown)
        lines += [_line(table, row, shown, {name for name, who in best.items() if row in who}) for row in rows]
        absent = [name for name, at in table.missing if at == budget]
        lines += [f"| {name} | {budget} | missing |" + " |" * (len(head) - 3) for name in absent]
    if full is None:
        lines.append("| full | | missing |" + " |" * (len(head) - 3))
    return [*lines, "", *_by_length(table), *_notes(table), ""]


def _by_length(table: Table) -> list[str]:
    """LongBench-E: scores of each bucket of length; a bucket without records has none."""
    if not table.config.get("settings", {}).get("e"):
        return []
    names = [label for _, label in BUCKETS]
    lines = [
        "| policy | budget | " + " | ".join(f"{name} words" for name in names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for row in table.rows:
        cells = []
        for name in names:
            found = [
                value_of(record, table.task)
                for run in row.runs
                for key, record in run.records.items()
                if key in table.keys and record["details"]["bucket"] == name
            ]
            cells.append(f"{fmean(found):.2f} (n = {len(found) // len(row.runs)})" if found else f"{DASH} (n = 0)")
        lines.append(f"| {row.label} | {'' if row.budget is None else row.budget} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _best(table: Table, rows: list[Row], shown: list[str]) -> dict[str, list[Row]]:
    """By column, the rows with the best value, among those that store as much as the row they are compared with."""
    fair = [row for row in rows if row.equal]
    if len(fair) < 2:
        return {}
    choose = min if table.lower_is_better else max
    found = {}
    for name in [*shown, ""]:
        value = choose(row.subsets[name] if name else row.score for row in fair)
        best = [row for row in fair if (row.subsets[name] if name else row.score) == value]
        found[name] = best if len(best) < len(fair) else []  # where all are alike, none is the best
    return found


def _line(table: Table, row: Row, shown: list[str], bold: set[str]) -> str:
    def number(value: float | None, digits: int = 2, factor: float = 1.0) -> str:
        return DASH if value is None else f"{factor * value:.{digits}f}"

    def strong(name: str, text: str) -> str:
        return f"**{text}**" if name in bold else text

    f = row.figures
    score = number(row.score) + (f" ± {row.spread:.2f}" if row.spread is not None else "")
    stored = number(f["stored"], 1) + ("" if row.equal else " ≠")
    cells = [row.label, "" if row.budget is None else str(row.budget)]
    cells += [strong(name, number(row.subsets[name])) for name in shown]
    cells += [strong("", score), f"{row.bounds[0]:.2f} to {row.bounds[1]:.2f}"]
    cells += [_apart(table, row.to_full, False), _apart(table, row.to_uncomp, True)]
    cells += [number(row.metrics.get(name)) for name in _further(table)]
    cells += [stored, number(f["share"], 2, 100) + " %", number(f["kv_bytes"], 2, 2**-20)]
    cells += [number(f["prefill_seconds"], 3), number(f["tokens_per_second"], 1)]
    if table.lower_is_better:
        cells += [number(f["kl"], 4), number(f["equal_argmax"], 3)]
    else:
        cells += [number(f["agreement"], 3), number(f["evicted_answer"], 3), number(f["head_consensus"], 3)]
    return "| " + " | ".join(cells) + " |"


def _further(table: Table) -> list[str]:
    """Metrics beside the one that counts, where all records have them."""
    return list(table.rows[0].metrics)[1:] if len({tuple(row.metrics) for row in table.rows}) == 1 else []


def _apart(table: Table, apart: tuple[float, float, float] | None, judge: bool) -> str:
    if apart is None:
        return DASH
    if judge and _none(table, apart):
        return f"no difference shown ({apart[1]:.2f} to {apart[2]:.2f})"
    if table.lower_is_better:
        return f"{apart[0]:.3f}x ({apart[1]:.3f} to {apart[2]:.3f})"
    return f"{apart[0]:+.2f} ({apart[1]:+.2f} to {apart[2]:+.2f})"


def _notes(table: Table) -> list[str]:
    """What a reader must know beside the numbers."""
    lines = []
    settings = [
        f"{row.label}: window {row.runs[0].summary['window']}, pool {row.runs[0].summary['pool']}"
        for row in {row.label: row for row in table.rows if row.label != "full"}.values()
    ]
    if settings:
        lines.append("Settings: " + "; ".join(settings) + ".")
    if any(not row.equal for row in table.rows):
        lines.append("≠ stores other than the row it is compared with, by more than 1 %: no winner is named there.")
    for budget in table.budgets():
        drawn = table.row("uncomp:order=random", budget)
        if drawn is not None and drawn.to_uncomp is not None and drawn.equal:
            worse = drawn.to_uncomp[1] > 1 if table.lower_is_better else drawn.to_uncomp[2] < 0
            if not worse:
                lines.append(f"Budget {budget}: random groups are as good as groups by entropy.")
    tests = sum(row.figures["uncompressed"] or 0 for row in table.rows)
    if tests:
        lines.append(f"{int(tests)} records over all rows have prompts that are not longer than the budget.")
    return lines
