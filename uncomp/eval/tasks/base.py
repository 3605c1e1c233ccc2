# SPDX-License-Identifier: Apache-2.0
"""What every task takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uncomp.eval.prompts import Example
from uncomp.eval.reading import Reader


@dataclass(frozen=True)
class Options:
    """What a user asks of a task.

    Fields:
        data: folder of the benchmark's files.
        subsets: files or settings of the task by name; None for the task's default.
        limit: the first N records of each subset; None for all.
        max_new_tokens: instead of the task's own; None for those.
        e: LongBench-E. hub: a data set of the hub that has the records; None: they are in the folder.
        shots: worked examples in front of a GSM8K problem.
        lengths: prompt tokens of generated tasks; None for the task's default.
        depths: per cent, of needles.
        samples: generated prompts of each subset and length.
        seed: of everything drawn.
        context: the model's positions; set before examples are made.
    """

    data: Path | None
    subsets: Sequence[str] | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    e: bool = False
    hub: str | None = None
    shots: int = 0
    lengths: Sequence[int] | None = None
    depths: Sequence[int] | None = None
    samples: int = 20
    seed: int = 42

    def chosen(self, task: str, known: Sequence[str], default: Sequence[str] | None = None) -> list[str]:
        """The subsets to run.

        Raises:
            ValueError: an unknown one, or a repeated one.
        """
        if self.subsets is None:
            return list(known if default is None else default)
        for name in self.subsets:
            if name not in known:
                raise ValueError(f"uncomp eval: --subset of {task} must be one of {', '.join(known)}; got {name}")
        if len(set(self.subsets)) != len(self.subsets):
            raise ValueError(f"uncomp eval: --subset names one twice: {','.join(self.subsets)}")
        return list(self.subsets)

    def folder(self, task: str) -> Path:
        """The folder of the data.

        Raises:
            ValueError: none was given, or it is no folder.
        """
        if self.data is None:
            raise ValueError(f"uncomp eval: {task} needs --data DIR, the folder of its files")
        if not self.data.is_dir():
            raise ValueError(f'uncomp eval: --data must be a folder; got "{self.data}"')
        return self.data


@dataclass(frozen=True)
class Source:
    """Data that has been read and checked.

    Fields:
        settings: what of the options changes the examples, for the run's record.
        examples: makes them, (tokenizer, positions of the model) -> examples in a fixed order.
    """

    settings: dict[str, Any]
    examples: Callable[[Any, int], list[Example]]


Read = Callable[[Options, Reader], Source]


def find(folder: Path, *names: str) -> Path:
    """The first of several places of a file that is there.

    Raises:
        ValueError: none is, naming the first.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"uncomp eval: {folder / names[0]} is missing")
