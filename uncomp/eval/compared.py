# SPDX-License-Identifier: Apache-2.0
"""The full cache's records that other runs are compared with: of the same call, or what an earlier one left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from uncomp.eval.folder import RUN, SOME, SUMMARY, RunFolder, read_records
from uncomp.eval.processes import Processes
from uncomp.eval.runs import Run

_SAME = ("task", "model", "dtype", "chat", "max_prompt", "max_new_tokens")
_SAME_SETTINGS = ("e", "seed", "shots")  # subsets, lengths and depths choose records, and change none


class Compared:
    """What the runs of one call are compared with, by question mode."""

    def __init__(
        self,
        out: Path,
        compare: Path | None,
        runs: Sequence[Run],
        folders: Sequence[RunFolder],
        processes: Processes,
        say: Callable[[str], None],
        *,
        needed: bool,
    ) -> None:
        """Reads what earlier calls left; the arguments are those of `earlier`, with the call's runs and folders.

        Args:
            say: prints a line that stays, about records that cannot be compared with.
        Raises:
            ValueError: as `earlier`.
        """
        self._processes, self._own, self._earlier = processes, {}, {}
        for run, folder in zip(runs, folders, strict=True):
            if compare is None and run.config.policy == "full":
                self._own[run.mode] = folder
        for run, folder in zip(runs, folders, strict=True):
            if run.config.policy == "full" or run.mode in {**self._own, **self._earlier}:
                continue
            where = (out, compare, run.mode, folder.config)
            found = processes.from_first(lambda where=where: earlier(*where, needed=needed))
            self._earlier[run.mode], text = found
            if text is not None:
                say(text)

    def records(self, mode: str) -> dict[str, dict[str, Any]] | None:
        """Of a question mode, by key; of a run of this call those that it has made so far."""
        own = self._own.get(mode)
        if own is None:
            return self._earlier[mode]
        return self._processes.from_first(lambda: _of(own.records().values()))


def _of(records: Any) -> dict[str, dict[str, Any]]:
    return {f"{r['subset']}/{r['id']}": {"tokens": r["tokens"], "prediction": r["prediction"]} for r in records}


def earlier(
    out: Path, compare: Path | None, mode: str, config: dict[str, Any], *, needed: bool
) -> tuple[dict[str, dict[str, Any]] | None, str | None]:
    """New ids and texts by key, from a finished run of the full cache over the same prompts.

    Args:
        out: folder of the task's runs, which may hold one. compare: a folder that the user named instead.
        mode: the question mode. config: what decides the records of this call's runs.
        needed: it cannot do without.
    Returns:
        them, or None; and in that case, where a run is there that cannot be compared with, a line that says why.
    Raises:
        ValueError: what the user named, or what is needed, is missing, not finished, or a run over other prompts.
    """
    folder = compare or out / f"full-full-{mode}"
    if compare is None and not (folder / SUMMARY).is_file():
        if needed:
            raise ValueError(f"uncomp eval: --teacher-forced needs a finished run of full ({folder}, or --compare DIR)")
        return None, None
    found = read_records(folder)
    try:
        before = json.loads((folder / RUN).read_text(encoding="utf-8"))["config"]
        other = _other(before, json.loads(json.dumps(config)))
        made = _of(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"uncomp eval: {folder} holds no run of a generating task") from error
    if other is None:
        return made, None
    text = f"uncomp eval: {folder} is a run with another {other}, so nothing can be compared with it"
    if needed or compare is not None:
        raise ValueError(text)
    return None, text


def _other(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What keeps two runs from having the same prompts and the same answers of the full cache."""
    if before["cache"]["policy"] != "full":
        return f"policy than full: {before['cache']['policy']}"
    for name in SOME:
        if None not in (before.get(name), now.get(name)) and before[name] != now[name]:
            return f"{name}: {before[name]!r} there, {now[name]!r} here"
    for name in _SAME:
        if before.get(name) != now.get(name):
            return f"{name}: {before.get(name)!r} there, {now.get(name)!r} here"
    for group, names in (("settings", _SAME_SETTINGS), ("data", tuple(now["data"]))):
        for name in names:
            there, here = before[group].get(name), now[group].get(name)
            if there != here and None not in (there, here):
                return f"{name}: {there!r} there, {here!r} here"
    return None
