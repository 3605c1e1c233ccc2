# SPDX-License-Identifier: Apache-2.0
"""Data files of benchmarks, read and checked line by line before a model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Check = Callable[[Any], bool]


class BadLine(ValueError):
    """A line that cannot be used; the message names file and line."""


def is_text(value: Any) -> bool:
    """A string with something in it."""
    return isinstance(value, str) and bool(value.strip())


def is_string(value: Any) -> bool:
    """A string, empty or not."""
    return isinstance(value, str)


def are_strings(value: Any) -> bool:
    """A non-empty list of strings."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def is_whole(value: Any) -> bool:
    """An integer that is no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


FIELDS: dict[Check, str] = {
    is_text: "a non-empty string",
    is_string: "a string",
    are_strings: "a non-empty list of strings",
    is_whole: "an integer",
}


class Reader:
    """Reads the files of one evaluation.

    Attributes:
        sha256: of every file read, by its path as given.
        skipped: messages of the lines that were left out.
    """

    def __init__(self, *, skip_bad: bool = False, on_skip: Callable[[str], None] | None = None) -> None:
        """skip_bad: leave bad lines out and tell on_skip, instead of raising."""
        self.sha256: dict[str, str] = {}
        self.skipped: list[str] = []
        self._skip, self._on_skip = skip_bad, on_skip

    def content(self, path: Path) -> bytes:
        """The whole file.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"uncomp eval: {path} cannot be read ({error.strerror})") from error
        self.sha256[str(path)] = hashlib.sha256(content).hexdigest()
        return content

    def text(self, path: Path) -> str:
        """The whole file as UTF-8 text."""
        try:
            return self.content(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"uncomp eval: {path} is not UTF-8 (byte {error.start})") from error

    def json(self, path: Path, kind: type) -> Any:
        """A file that is one JSON value of a kind: dict or list."""
        text = self.text(path)
        try:
            value = _parsed(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"uncomp eval: {path}:{error.lineno}: no JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"uncomp eval: {path}: no JSON ({error})") from error
        if not isinstance(value, kind):
            raise ValueError(f"uncomp eval: {path} must hold a JSON {kind.__name__}; got {type(value).__name__}")
        return value

    def refuse(self, path: Path, line: int, message: str) -> None:
        """Says that a line is bad: raises BadLine, or remembers it where bad lines are left out."""
        text = f"uncomp eval: {path}:{line}: {message}"
        if not self._skip:
            raise BadLine(text)
        self.skipped.append(text)
        if self._on_skip is not None:
            self._on_skip(text)

    def lines(
        self, path: Path, fields: Mapping[str, Check], *, identity: str | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Line numbers, from 1, and the objects of a JSON Lines file.

        Args:
            path: of the file; empty lines are passed over.
            fields: what each object must have, and a check of `FIELDS`.
            identity: a field whose values must differ, where it is there.
        Raises:
            BadLine: a line that is no UTF-8, no JSON object, lacks a field, has a bad one, or repeats an identity.
            ValueError: a file that cannot be read or holds no record.
        """
        seen: dict[Any, int] = {}
        found = 0
        for number, line in enumerate(self.content(path).split(b"\n"), 1):
            if not line.strip():
                continue
            found += 1
            try:
                record = _parsed(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                self.refuse(path, number, f"not UTF-8 (byte {error.start} of the line)")
                continue
            except (ValueError, RecursionError) as error:
                self.refuse(path, number, f"no JSON ({getattr(error, 'msg', error)})")
                continue
            if not isinstance(record, dict):
                self.refuse(path, number, f"must be a JSON object; got {type(record).__name__}")
                continue
            wrong = next((name for name, check in fields.items() if not check(record.get(name))), None)
            if wrong is not None:
                got = _short(record[wrong]) if wrong in record else "no such field"
                self.refuse(path, number, f"field '{wrong}' must be {FIELDS[fields[wrong]]}; got {got}")
                continue
            key = record.get(identity) if identity else None
            if isinstance(key, (str, int)) and key in seen:
                self.refuse(path, number, f"field '{identity}' repeats that of line {seen[key]}: {_short(key)}")
                continue
            if isinstance(key, (str, int)):
                seen[key] = number
            yield number, record
        if not found:
            raise ValueError(f"uncomp eval: {path} holds no record")


def _parsed(text: str) -> Any:
    """One JSON value; half a surrogate pair, which no tokenizer reads, is refused as if it were none."""
    value = json.loads(text)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair in a string") from None
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
