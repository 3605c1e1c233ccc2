# SPDX-License-Identifier: Apache-2.0
"""What a run cost in one call: seconds in the model and in all, decode steps recorded, replayed or neither."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_STEPS = ("steps_recorded", "steps_replayed", "steps_eager")


@dataclass
class Effort:
    """Of one process, or summed over several.

    Fields:
        records: that this call made.
        model_seconds: in prefill and decode, compression included, and in the passes of `teacher_forced`.
        seconds: in all: the model, patching it, scores, writing records.
        patches: how often the model was patched.
        peak: most bytes in use on a GPU; 0 elsewhere.
        steps_recorded, steps_replayed, steps_eager: decode steps, as `PatchHandle.steps` counts them.
        reason: why the last step that was not replayed was not.
    """

    records: int = 0
    model_seconds: float = 0.0
    seconds: float = 0.0
    patches: int = 0
    peak: int = 0
    steps_recorded: int = 0
    steps_replayed: int = 0
    steps_eager: int = 0
    reason: str | None = None

    @contextmanager
    def until_broken_off(self) -> Iterator[None]:
        """Around a call of the model: one that is broken off tells no seconds, and what it spent was the model's."""
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            self.model_seconds += time.perf_counter() - started
            raise

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Around what calls the model without telling its seconds."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.model_seconds += time.perf_counter() - started

    def count(self, stats: dict[str, Any]) -> None:
        """Adds what a handle counted since it was patched."""
        for name in _STEPS:
            setattr(self, name, getattr(self, name) + stats.get(name, 0))
        self.reason = stats.get("eager_reason") or self.reason

    def add(self, other: Effort) -> None:
        """Adds another one."""
        for name in ("records", "model_seconds", "seconds", "patches", *_STEPS):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.peak, self.reason = max(self.peak, other.peak), other.reason or self.reason

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a summary."""
        return {
            "records": self.records,
            "model_seconds": round(self.model_seconds, 3),
            "seconds": round(self.seconds, 3),
            "patches": self.patches,
            **{name: getattr(self, name) for name in _STEPS},
            "eager_reason": self.reason,
        }


def total(efforts: Iterable[Effort]) -> Effort:
    """Their sum."""
    made = Effort()
    for effort in efforts:
        made.add(effort)
    return made


def line(effort: Effort, seconds: float, loading: float, reading: float) -> str:
    """Where the time of a whole call went.

    Args:
        effort: of all its runs, of one process. seconds: of all runs, folders and summaries included. loading: for the
            model. reading: for data and prompts.
    """
    other = max(0.0, seconds - effort.model_seconds)
    share = 100 * other / seconds if seconds > 0 else 0.0
    return (
        f"uncomp eval: {effort.records} records, {effort.model_seconds:.1f} s in the model (prefill and decode), "
        f"{other:.1f} s beside it ({share:.1f} %); {reading:.1f} s to make prompts, {loading:.1f} s to load; "
        f"{loading + reading + seconds:.1f} s in all; steps: {effort.steps_recorded} recorded, "
        f"{effort.steps_replayed} replayed, {effort.steps_eager} ordinary"
    )
