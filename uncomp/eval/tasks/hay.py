# SPDX-License-Identifier: Apache-2.0
"""Long texts that hide something: essays cut to a number of tokens, and sentence ends to hide it at."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any

from uncomp.eval.prompts import encode
from uncomp.eval.reading import Reader
from uncomp.eval.tasks.base import Options

_END = re.compile(r"[.!?](?=\s)")


def essays(options: Options, reader: Reader, task: str) -> str:
    """The text files of the data folder in name order, joined by newlines.

    They are `PaulGrahamEssays/*.txt`, `niah/PaulGrahamEssays/*.txt` or `*.txt` of the folder.

    Raises:
        ValueError: there are none.
    """
    folder = options.folder(task)
    for place in ("PaulGrahamEssays", "niah/PaulGrahamEssays", "."):
        files = sorted((folder / place).glob("*.txt"))
        if files:
            text = "\n".join(reader.text(file) for file in files)
            if not text.strip():
                raise ValueError(f"uncomp eval: the .txt files of {folder / place} are empty")
            return text
    raise ValueError(f"uncomp eval: {folder}/PaulGrahamEssays has no .txt file to hide a needle in")


class Hay:
    """A text that is tokenised once and cut to any number of tokens; it is repeated where it is too short."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer, self._once = tokenizer, text
        self._text, self._starts, self._copies = "", [], 0

    def cut(self, tokens: int) -> tuple[str, list[int]]:
        """The first `tokens` tokens: their text, and the character at which each begins."""
        while len(self._starts) <= tokens:  # one more than is asked for tells where the last one ends
            self._copies = max(1, 2 * self._copies)
            self._text = "\n".join([self._once] * self._copies)
            self._starts = [start for start, _ in encode(self._tokenizer, self._text)[1]]
        return self._text[: self._starts[tokens]], self._starts[:tokens]


def place(text: str, starts: list[int], depth: float) -> int:
    """The character behind the last sentence that ends at or before a depth.

    Args:
        text: whole, and `starts` of its tokens.
        depth: per cent of the tokens, 0 to 100.
    Returns:
        0 for depth 0, the length of the text for 100.
    """
    if depth <= 0 or depth >= 100:
        return 0 if depth <= 0 else len(text)
    target = starts[min(int(depth * len(starts) / 100), len(starts) - 1)] if starts else 0
    ends = [found.end() for found in _END.finditer(text)]
    i = bisect_right(ends, target)
    return ends[i - 1] if i else 0


def insert(text: str, pieces: list[tuple[int, str]]) -> str:
    """Puts pieces into a text, each at its character; equal places keep the order of the list."""
    for at, piece in sorted(pieces, key=lambda entry: entry[0], reverse=True):
        text = text[:at] + piece + text[at:]
    return text
