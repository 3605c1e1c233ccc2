# SPDX-License-Identifier: Apache-2.0
"""Folders of finished runs, read and checked: what `uncomp report` makes tables of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uncomp.eval import partial
from uncomp.eval.folder import RUN, SOME, SUMMARY, read_records
from uncomp.eval.runs import parse_policy

SHARED = ("window", "pool_width", "profile")  # the decode rule, which full takes too, is a matter of `Finished.table`


@dataclass(frozen=True)
class Finished:
    """One run that is done: run.json, summary.json and its records by "subset/id"."""

    path: Path
    about: dict[str, Any]
    summary: dict[str, Any]
    records: dict[str, dict[str, Any]]
    whole: bool = True  # False: it was stopped, and these are the records so far

    @property
    def table(self) -> str:
        """What rows of one table share: model, dtype, data, prompts, question mode, decode rule; and `weights`."""
        config = self.about["config"]
        shared = {name: value for name, value in config.items() if name != "cache" and name not in SOME}
        return json.dumps({**shared, "decode": config["cache"]["decode"]}, sort_keys=True)

    @property
    def weights(self) -> str | None:
        """Which of the models of that shape; None where the run does not tell."""
        return self.about["config"].get("weights")

    @property
    def shared(self) -> dict[str, Any]:
        """Settings that the call gave all its policies but full: they make a table of their own."""
        options = self.about.get("options") or {}
        return {name: options[name] for name in SHARED if options.get(name) is not None}

    @property
    def label(self) -> str:
        """The policy as written, without a seed: runs that differ in it are one row."""
        name, fields = parse_policy(self.summary["policy"])
        kept = [p for p in self.summary["policy"].partition(":")[2].split(",") if p and not p.startswith("seed=")]
        return ":".join([name, ",".join(kept)]) if kept and fields else name


def collect(folders: Sequence[Path], *, stopped: bool = False) -> tuple[list[Finished], list[Path]]:
    """The finished runs under some folders, and folders of runs that are not finished.

    Args:
        stopped: runs that were stopped are taken with the records that they have, if any.
    Raises:
        ValueError: a folder that is none, no run at all, or a file that cannot be read.
    """
    done: dict[Path, Finished] = {}
    open_runs: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f'uncomp report: "{folder}" is no folder')
        for file in sorted(folder.rglob(RUN)):
            path = file.parent.resolve()
            if path in done or path in open_runs:
                continue
            if not (path / SUMMARY).is_file():
                about = _json(path / RUN)
                summary, records = partial.read(path, about) if stopped else ({}, {})
                if records:
                    done[path] = _checked(Finished(path, about, summary, records, whole=False))
                else:
                    open_runs.append(path)
                continue
            records = {f"{r['subset']}/{r['id']}": r for r in read_records(path)}
            done[path] = _checked(Finished(path, _json(path / RUN), _json(path / SUMMARY), records))
    if not done:
        named = ", ".join(map(str, folders))
        wanted = "run with a record" if stopped else "finished run"
        files = RUN if stopped else SUMMARY
        raise ValueError(f"uncomp report: no {wanted} under {named} (folders with {files})")
    return list(done.values()), open_runs


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"uncomp report: {path} cannot be read ({error})") from error


def _checked(run: Finished) -> Finished:
    """The run, if its files are those of `uncomp eval`.

    Raises:
        ValueError: they are of something else, or were changed.
    """
    try:
        config, budget = run.about["config"], run.summary["budget"]
        _ = (
            run.table,
            run.label,
            run.shared,
            run.about["model"],
            run.about["device"],
            config["dtype"],
            config.get("max_prompt"),
        )
        _ = [run.summary[name] for name in ("mode", "window", "pool")]
        _ = config.get("settings", {}).get("e")
        if not isinstance(run.weights, (str, type(None))) or not isinstance(budget, (int, float, type(None))):
            raise TypeError("weights, budget")
        if run.summary["task"] != config["task"]:
            raise ValueError("task")
        for record in run.records.values():
            _check(record, run.summary["task"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"uncomp report: {run.path} holds no run of uncomp eval, or its files were changed") from error
    return run


# What tables compute with, of every record, of those of a task, and of those that have it.
_ALWAYS = (("stored", "mean"),)
_CONTINUATION = (("stored", "share"), ("score", "loss"))
_GENERATED = (("stored", "end"), ("prompt_tokens",), ("new_tokens",), ("seconds", "prefill"), ("seconds", "decode"))
_NEEDLE = (("details", "length"), ("details", "depth"))
_SOMETIMES = (("bytes", "kv"), ("bytes", "allocated"), ("evicted_answer",), ("head_consensus",))


def _check(record: dict[str, Any], task: str) -> None:
    """Raises TypeError or KeyError where a number is missing or is none."""
    needed = [
        *_ALWAYS,
        *(_CONTINUATION if task == "perplexity" else _GENERATED),
        *(_NEEDLE if task == "needle" else ()),
    ]
    values = [at(record, path) for path in needed]
    optional = [at(record, path) for path in _SOMETIMES]
    for group in ("score", "agreement"):
        optional += record.get(group, {}).values()
    if not record["score"] or not all(isinstance(value, (int, float)) for value in values):
        raise TypeError(f"record {record['id']}")
    if not all(isinstance(value, (int, float, type(None))) for value in optional):
        raise TypeError(f"record {record['id']}")
    if next(iter(record["score"].values())) is None or not isinstance(record.get("details", {}), dict):
        raise TypeError(f"record {record['id']}")


def at(record: dict[str, Any], path: Sequence[str]) -> Any:
    """The value at a path; None where it ends early."""
    found: Any = record
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found
