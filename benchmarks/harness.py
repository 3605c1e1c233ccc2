# SPDX-License-Identifier: Apache-2.0
"""How every operator is timed, in one file, so that all numbers mean the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Run = Callable[[], object]


@dataclass
class Case:
    """One row of a benchmark.

    `ours(i)` and each rival build input set `i` on the current CUDA device and return the call to be timed, without
    arguments. Calls are captured in a CUDA graph; a rival that cannot be captured is timed eagerly and marked so.
    """

    op: str
    shape: str  # e.g. "8x32768 k=1552"
    dtype: str
    bytes: int  # that must move: each input byte read once, each output byte written once
    ours: Callable[[int], Run]
    rivals: dict[str, Callable[[int], Run]] = field(default_factory=dict)
