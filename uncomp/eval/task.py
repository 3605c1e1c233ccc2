# SPDX-License-Identifier: Apache-2.0
"""What one call runs: its examples, their prompts, and the settings that all its runs share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uncomp.eval.prompts import Example, Prompt, adds_bos, build


@dataclass(frozen=True)
class Settings:
    """How a task is run, beside its data and its policies.

    Fields:
        out: folder of the task's runs.
        batch_size: prompts a batch.
        chat: one of `prompts.CHAT`.
        max_prompt: the most tokens of a prompt; None: what the model takes beside the new ones.
        resume: go on with runs that are there.
        compare: folder of a finished run of the full cache; None: the one under `out`, where it is there.
        per_row: records tell the stored tokens of every row.
        teacher_forced: also feed the full cache's new tokens and compare what each cache would say next.
        skip_bad: leave out examples that make no prompt.
        rounds: shares of the examples; every run does one before any does the next, so that what a kill leaves behind
            can be compared. Each share patches the model anew.
        common: further values that decide a record's result, by name.
        about: further values of run.json, by name.
    """

    out: Path
    batch_size: int
    chat: str
    max_prompt: int | None
    resume: bool
    compare: Path | None
    per_row: bool
    teacher_forced: bool
    skip_bad: bool
    common: dict[str, Any]
    about: dict[str, Any]
    rounds: int = 1


class Task:
    """The examples of one call and their prompts, which are tokenised once for all runs."""

    def __init__(self, tokenizer: Any, examples: Sequence[Example], settings: Settings, positions: int) -> None:
        self.tokenizer, self.examples, self.settings, self.positions = tokenizer, examples, settings, positions
        self.keys = [f"{example.subset}/{example.id}" for example in examples]
        if len(set(self.keys)) < len(self.keys):  # a folder with one record twice could not be read again
            twice = next(key for i, key in enumerate(self.keys) if key in self.keys[:i])
            raise ValueError(f"uncomp eval: ids, lengths and depths must differ; {twice} is there twice")
        self._bos = adds_bos(tokenizer)
        self._prompts: dict[int, Prompt] = {}

    def prompt(self, index: int) -> Prompt:
        """Of an example.

        Raises:
            ValueError: names the example.
        """
        if index not in self._prompts:
            example, settings = self.examples[index], self.settings
            most = self.positions - example.max_new_tokens
            most = most if settings.max_prompt is None else min(most, settings.max_prompt)
            if most < 1:
                raise ValueError(
                    f"uncomp eval: {example.subset}: {example.max_new_tokens} new tokens must leave room for a prompt "
                    f"in the model's {self.positions} positions"
                )
            self._prompts[index] = build(self.tokenizer, example, chat=settings.chat, max_prompt=most, bos=self._bos)
        return self._prompts[index]

    def tokenise(self, rank: int, count: int) -> float:
        """Makes the prompts of one of several processes, where they can be made; gives the seconds that it took."""
        started = time.perf_counter()
        for index in range(rank, len(self.examples), count):
            with contextlib.suppress(ValueError):  # told when the prompt is asked for
                self.prompt(index)
        return time.perf_counter() - started

    def batches(self, indices: Collection[int], size: int, *, even: bool = False) -> Iterator[list[int]]:
        """Batches of prompts of like length that generate as many tokens, the longest first: memory runs out early.

        Args:
            even: prompts of a batch have as many ids behind their boundary, see `batch.run`.
        """

        def alike(index: int) -> tuple[int, int]:
            prompt = self.prompt(index)
            return self.examples[index].max_new_tokens, len(prompt.ids) - prompt.boundary if even else 0

        order = sorted(indices, key=lambda i: (alike(i), -len(self.prompt(i).ids), i))
        start = 0
        while start < len(order):
            wanted = alike(order[start])
            group = [i for i in order[start : start + size] if alike(i) == wanted]
            start += len(group)
            yield group
