# SPDX-License-Identifier: Apache-2.0
"""The folder of one run: its options, its records as they come, and what is made of them at the end.

A record is one line, written in one piece behind its batch; every process writes a part of its own. A kill can
leave one unfinished line at the end of a part, which is cut off when the run is resumed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import subprocess
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from uncomp.whole_files import write_whole

SYNC_SECONDS = 5.0  # records of so long may be lost with the machine; with the process alone none that is written
RUN, EXAMPLES, SUMMARY = "run.json", "examples.jsonl", "summary.json"
SOME = ("weights",)  # values that not every run.json tells; where one is missing it is not compared


class RunFailure(RuntimeError):
    """A run stopped for a reason that is no bad input: exit status 1, one line on stderr."""


def run_name(policy: str, budget: int | float | None, mode: str) -> str:
    """Name of a run's folder: POLICY-BUDGET-MODE without characters that files should not have."""
    return re.sub(r"[^A-Za-z0-9.\-]", "_", f"{policy}-{'full' if budget is None else budget}-{mode}")


def digest(values: dict[str, Any]) -> str:
    """Short hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def commit() -> str | None:
    """UNCOMP_COMMIT, else the commit of the checkout that this package runs from; None without either."""
    if named := os.environ.get("UNCOMP_COMMIT"):
        return named
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    call = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all.

    Raises:
        RunFailure: the disk is full, or the folder cannot be written.
    """
    write_together({path: value})


def write_together(files: Mapping[Path, Any], *, command: str = "uncomp eval") -> None:
    """Writes files whole, and all of them or none; see write_whole.

    Args:
        files: text, bytes or a JSON value for each. command: whose failure it would be.
    Raises:
        RunFailure: the disk is full, or a folder cannot be written.
    """
    try:
        write_whole({path: _content(value) for path, value in files.items()})
    except OSError as error:
        raise RunFailure(f"{command}: {error.filename} cannot be written ({error.strerror})") from error


def _content(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    # A folder's name may hold bytes that are no UTF-8: they become what JSON writes for them.
    return text.encode("utf-8", errors="backslashreplace")


class RunFolder:
    """One run's files.

    Attributes:
        path: the folder.
        config: values that decide a record's result. hash: of them.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config, self.hash = path, config, digest(config)
        self._synced = time.monotonic()

    def _part(self, rank: int) -> Path:
        return self.path / f"part-{rank}.jsonl"

    def parts(self) -> list[Path]:
        """The parts that are there."""
        return sorted(self.path.glob("part-*.jsonl"))

    def open(self, about: dict[str, Any], *, resume: bool) -> dict[str, dict[str, Any]]:
        """Prepares the folder and reads what is finished; for one process, before any other writes.

        Args:
            about: further values of run.json.
            resume: go on where an earlier call stopped.
        Returns:
            finished records by "subset/id".
        Raises:
            ValueError: results are there and resume is off; a run of another config, naming what differs; a line in
                the middle of a part that cannot be read; a record twice; another process that writes here.
            RunFailure: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFailure(f"uncomp eval: {self.path} cannot be made ({error.strerror})") from error
        self._hold()
        there = (self.path / RUN).exists() or self.parts()
        if there and not resume:
            raise ValueError(f"uncomp eval: {self.path} holds results already; use --resume or another --out")
        done: dict[str, dict[str, Any]] = {}
        if there:
            self._compare()
            if not self.parts() and (self.path / EXAMPLES).is_file():  # only what a finished run needs was kept
                write_together({self._part(0): (self.path / EXAMPLES).read_bytes()})
            done = self._read(mend=True)
        write_json(self.path / RUN, {"hash": self.hash, "config": self.config, **about})
        return done

    def _hold(self) -> None:
        """Keeps other processes out for as long as this object lives: two that write would repeat records."""
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except OSError:
            return
        weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"uncomp eval: {self.path} is being written by another process") from error
        except OSError:
            return  # a file system without locks

    def _compare(self) -> None:
        try:
            before = json.loads((self.path / RUN).read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"uncomp eval: {self.path / RUN} cannot be read, so the run cannot be resumed") from error
        for name, value in json.loads(json.dumps(self.config)).items():
            if before.get(name) != value and not (name in SOME and before.get(name) is None):
                raise ValueError(
                    f"uncomp eval: {self.path} is a run with another {name}, which --resume cannot go on with: "
                    f"{_difference(before.get(name), value)}"
                )

    def _read(self, *, mend: bool = False) -> dict[str, dict[str, Any]]:
        done: dict[str, dict[str, Any]] = {}
        for part in self.parts():
            content = part.read_bytes()
            lines = content.split(b"\n")
            unfinished, good = lines.pop(), 0  # what stands behind the last newline
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    key = f"{record['subset']}/{record['id']}"
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    if number == len(lines) and not unfinished:
                        break  # a write that the machine did not finish
                    raise ValueError(f"uncomp eval: {part}:{number} is no record; the file was changed") from error
                if key in done:
                    raise ValueError(f"uncomp eval: {part}:{number} repeats the record {key}")
                done[key] = record
                good += len(line) + 1
            if mend and good < len(content):
                with open(part, "r+b") as file:
                    file.truncate(good)
        return done

    def records(self) -> dict[str, dict[str, Any]]:
        """Records that are finished, by "subset/id"; a last line that is not whole is left out."""
        return self._read()

    def append(self, rank: int, records: Iterable[dict[str, Any]]) -> None:
        """Adds the records of a batch to this process's part, each in one write; the disk follows within seconds.

        Raises:
            RunFailure: the disk is full; what was written before is whole.
        """
        path = self._part(rank)
        try:
            with open(path, "ab", buffering=0) as file:
                for record in records:
                    line = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if time.monotonic() - self._synced >= SYNC_SECONDS:
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
        except OSError as error:
            raise RunFailure(
                f"uncomp eval: {path} cannot be written ({error.strerror}); make room and use --resume"
            ) from error

    def merge(self, order: Sequence[str]) -> list[dict[str, Any]]:
        """Writes examples.jsonl from all parts.

        Args:
            order: "subset/id" of the records that belong to this call.
        Returns:
            those records, in that order; further ones in the folder stay in examples.jsonl, behind them.
        """
        done = self._read()
        missing = [key for key in order if key not in done]
        if missing:
            raise RunFailure(f"uncomp eval: {self.path}: {len(missing)} records are missing, {missing[0]} first")
        wanted = [done[key] for key in order]
        rest = sorted((done[key] for key in done.keys() - set(order)), key=lambda r: r["index"])
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in [*wanted, *rest])
        write_json(self.path / EXAMPLES, "".join(lines))
        return wanted


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return ", ".join(f"{name} {before.get(name)!r} there, {now.get(name)!r} here" for name in names)
    return f"{before!r} there, {now!r} here"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a finished run, from its folder.

    Raises:
        ValueError: no examples.jsonl, a line of it that is no record, a record twice.
    """
    file = path / EXAMPLES
    if not file.is_file():
        raise ValueError(f"uncomp eval: {file} is missing; the run has not finished (use --resume)")
    made: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
                key = f"{record['subset']}/{record['id']}"
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                what = "no JSON" if isinstance(error, (ValueError, RecursionError)) else "no record"
                raise ValueError(f"uncomp eval: {file}:{number}: {what}") from error
            if key in made:
                raise ValueError(f"uncomp eval: {file}:{number} repeats the record {key}")
            made[key] = record
    if not made:
        raise ValueError(f"uncomp eval: {file} holds no record")
    return list(made.values())
