# SPDX-License-Identifier: Apache-2.0
"""`uncomp report DIR...`: one table of finished runs, with stored tokens beside every score, and figures."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uncomp.cli_options import add_command, add_json


def add(commands: Any) -> None:
    """Adds the command to what argparse's add_subparsers returned."""
    text = "Compares finished runs of uncomp eval: tables and figures."
    parser = add_command(commands, "report", text, _report)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="runs, or folders that hold some at any depth")
    parser.add_argument("--out", metavar="DIR", help="where report.md, .csv, .json and figures go; default: the first")
    parser.add_argument(
        "--stopped", action="store_true", help="take runs that did not finish, with the records they have"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the bootstrap; default %(default)s")
    add_json(parser, "the tables as one JSON value on stdout")


def _report(args: argparse.Namespace, progress: Any) -> int:
    from uncomp.eval import finished, report, tables
    from uncomp.eval.folder import RunFailure, write_together

    runs, unfinished = finished.collect([Path(folder) for folder in args.folders], stopped=args.stopped)
    made = tables.make(runs, seed=args.seed)
    out = Path(args.out or args.folders[0])
    text = report.to_markdown(made, unfinished)
    values = report.to_json(made)
    files = {"report.md": text, "report.csv": report.to_csv(made), "report.json": values, **_draw(made)}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'uncomp report: --out "{out}" cannot be made ({error.strerror})') from error
    try:
        write_together({out / name: content for name, content in files.items()}, command="uncomp report")
    except RunFailure as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(values) if args.json else text, end="\n" if args.json else "")
    return 0


def _draw(made: list[Any]) -> dict[str, bytes]:
    """Pictures by the names of their files; what cannot be drawn is said."""
    from uncomp import figures

    drawn: dict[str, bytes] = {}
    try:
        figures.formats()
    except ImportError as error:
        print(f"uncomp report: no figures were drawn: {error}", file=sys.stderr)
        return drawn
    for index, table in enumerate(made):
        name = re.sub(r"[^A-Za-z0-9]+", "-", f"{table.task}-{table.mode}-{index}")
        try:
            for ending, figure in _figures_of(table):
                drawn[f"{name}-{ending}.png"] = figures.png(figure)
        except ValueError as error:  # a score that is no number
            print(f"uncomp report: a figure of {name} was not drawn: {error}", file=sys.stderr)
    return drawn


def _figures_of(table: Any) -> Iterator[tuple[str, Any]]:
    """Ends of names, and figures."""
    from uncomp import figures

    title = f"{table.task}, question-{table.mode}"
    full = table.row("full", None)
    lines: dict[str, dict[float, float]] = {}
    for row in table.rows:
        if row.budget is not None:
            lines.setdefault(row.label, {})[row.figures["stored"]] = row.score
    if lines:
        ylabel = "perplexity" if table.lower_is_better else "score"
        baseline = full.score if full else None
        yield "stored", figures.lines(lines, "stored tokens a row", ylabel, baseline=baseline, title=title)
    if len(table.rows[0].subsets) > 1:
        for budget in table.budgets():
            rows = [*([full] if full else []), *table.at(budget)]
            bars = {row.label: row.subsets for row in rows}
            yield f"tasks-{budget}", figures.grouped_bars(bars, "score", title=f"{title}, budget {budget}")
    if table.task == "needle":
        maps = {f"{row.label} {row.budget or ''}".strip(): _needles(row) for row in table.rows}
        yield "map", figures.needle_map(maps, title=title)


def _needles(row: Any) -> dict[tuple[int, int], float]:
    """Mean hit by length and depth, over needles and seeds."""
    found: dict[tuple[int, int], list[float]] = {}
    for run in row.runs:
        for record in run.records.values():
            where = (record["details"]["length"], record["details"]["depth"])
            found.setdefault(where, []).append(next(iter(record["score"].values())))
    return {where: sum(values) / len(values) for where, values in found.items()}
