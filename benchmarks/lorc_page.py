# SPDX-License-Identifier: Apache-2.0
"""A page of what low rank loses, and its numbers beside it, from files of lorc_quality.py.

    python benchmarks/lorc_page.py --section NAME F ... --section NAME F ... --out docs/results/lorc.md

What stands between the two marks of an earlier page at --out, the findings, is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from lorc_lost import lost, schedules
from lorc_table import merged, table

BEGIN, END = "<!-- findings -->", "<!-- /findings -->"
_PLACES = {"text": 2, "calibrate": 2, "needle": 1, "longbench": 1}  # parts of a path that a command shows
_LEFT_OUT = ("model", "share", "json", "out", "deadline", "merge", "device", "dtype")
HEAD = """# Keys and values of low rank, alone and under eviction

`python benchmarks/lorc_quality.py` with the options of each section (`--share 1/3` to `3/3` in processes of their own),
then `python benchmarks/lorc_page.py`. Each state of a model, as it is and compressed, is given the same continuations
behind compressed prefixes, needles and LongBench records, with the full cache and with `uncomp` at {budget:.2%} of the
tokens. Perplexity feeds one token at a time behind the compressed prefix; needles and LongBench are those of
`uncomp eval`, question-aware. "Bytes" are keys and values behind a prefix, of those of the full cache at full width.
Brackets hold 95 % of 10 000 bootstrap draws over continuations or records, paired. Scores of single records stand in
the .json beside.
"""


def words(options: dict[str, Any]) -> list[str]:
    """The options of a row as a command would say them, each with its values; paths of data under DATA."""
    found = []
    for name, value in options.items():
        if name in _LEFT_OUT:
            continue
        if name in _PLACES:
            value = "/".join(["DATA", *Path(value).parts[-_PLACES[name] :]])
        values = value if isinstance(value, list) else [value]
        found.append(" ".join([f"--{name.replace('_', '-')}", *map(str, values)]))
    return found


def command(options: dict[str, Any]) -> str:
    """A command as Markdown, in lines of at most 120 characters."""
    lines, line = [], "    python benchmarks/lorc_quality.py --model MODEL"
    for word in words(options):
        if len(line) + len(word) > 117:
            lines.append(line + " \\")
            line = "     "
        line += f" {word}"
    return "\n".join([*lines, line])


def section(name: str, rows: Sequence[dict]) -> str:
    """Markdown of one model on one machine."""
    first = rows[0]
    where = (
        f"{name} on {first['device']}, {first['dtype']}, torch {first['torch']}, transformers {first['transformers']}"
    )
    measured = [f"## {name}, {first['device']}\n", command(first["options"]), f"\n{where}, commit {first['commit']}."]
    measured += [f"A cell has {records(rows)}.\n"]
    measured += [table(rows), ""]
    stopped = [row for row in rows if "stopped_before" in row]
    if stopped:
        measured.append(f"{len(stopped)} rows were stopped before their end; empty cells were not measured.\n")
    same = sum("same_ranks_as" in row for row in rows)
    if same:
        measured.append(f"{same} rows have the ranks of another schedule above or below them, and its numbers.\n")
    for title, text in (
        ("Less the model as it is, with the same cache", lost(rows)),
        ("Schedules less uniform ranks, mean over rho", schedules(rows)),
    ):
        if text:
            measured += [f"{title}:\n", text, ""]
    return "\n".join(measured)


def records(rows: Sequence[dict]) -> str:
    """How many of each kind a cell of the table was made of."""
    options, found = rows[0]["options"], []
    whole = [row["full"] for row in rows if "full" in row]
    if any("losses" in values for values in whole):
        text = f"continuations of {options['continuation']} tokens behind {options['prefix']}"
        found.append(f"{max(len(values.get('losses', ())) for values in whole)} {text}")
    for key, text in (("needle_records", "needles"), ("longbench_records", "records of LongBench")):
        if most := max((len(values.get(key, ())) for values in whole), default=0):
            found.append(f"{most} {text}")
    return ", ".join(found)


def findings(path: Path) -> str:
    """What an earlier page says between its marks, with them."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN in text and END in text:
        return text[text.index(BEGIN) : text.index(END) + len(END)]
    return f"{BEGIN}\n{END}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and its .json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--section", nargs="+", action="append", required=True, metavar="NAME F", help="name and files")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    parts, numbers, budgets = [], [], set()
    for name, *files in options.section:
        if not files:
            parser.error(f"--section {name} needs files")
        rows = merged([json.loads(Path(path).read_text(encoding="utf-8")) for path in files])
        parts.append(section(name, rows))
        budgets |= {float(row["options"]["budget"]) for row in rows}
        numbers += [{**row, "model": name, "options": words(row["options"])} for row in rows]
    if len(budgets) > 1:
        parser.error(f"sections of one page must share the budget; got {sorted(budgets)}")
    text = "\n".join([HEAD.format(budget=budgets.pop()), findings(options.out), "", *parts])
    options.out.write_text(text.rstrip() + "\n", encoding="utf-8")
    options.out.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
