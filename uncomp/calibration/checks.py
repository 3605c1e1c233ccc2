# SPDX-License-Identifier: Apache-2.0
"""Checks of what stands in a profile: shapes, finite numbers, votes that add up."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import Any

from uncomp.calibration.fingerprint import ModelFacts

ROWS = ("kv_head", "query_head")
_ROUNDING = 1e-3
HeadTable = tuple[tuple[float, ...], ...]


def refuse(text: str) -> ValueError:
    """The error of this package for a profile or a setting of it."""
    return ValueError(f"uncomp.calibration: {text}")


def tuples(value: Any) -> Any:
    """Nested lists as nested tuples."""
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def check_array(name: str, value: Any, shape: tuple[int, ...], kind: type) -> None:
    """Raises ValueError unless value is nested tuples of that shape holding finite numbers."""
    level = [value]
    for depth, size in enumerate(shape):
        if any(not isinstance(part, tuple) or len(part) != size for part in level):
            raise refuse(f"{name} must have shape {list(shape)}; got another length in dimension {depth}")
        level = [item for part in level for item in part]
    for item in level:
        if isinstance(item, bool) or not isinstance(item, (int, kind)) or not _finite(item):
            raise refuse(f"{name} must hold finite numbers ({kind.__name__}); got {item!r}")


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float holds
        return False


def check_tables(profile: Any) -> None:
    """Raises ValueError unless every table of a profile has its shape."""
    facts: ModelFacts = profile.model
    heads = (facts.L, facts.Hq)
    for name in ("entropy", "entropy_full"):
        check_array(name, getattr(profile, name), heads, float)
        if profile.run.kind != "variance":
            _check_shares(name, getattr(profile, name))
    hidden = profile.run.tensor == "hidden" and isinstance(profile.spectrum, tuple) and len(profile.spectrum) > 1
    check_array("spectrum", profile.spectrum, (len(profile.spectrum) if hidden else facts.D,), float)
    check_array("curve", profile.curve, (facts.L,), float)
    for name in ("entropy_spread", "erank", "erank_spread"):
        if getattr(profile, name) is not None:
            check_array(name, getattr(profile, name), heads, float)
    if profile.stability is not None:
        _check_stability(profile.stability)


def _check_shares(name: str, table: HeadTable) -> None:
    """Entropies are shares of ln D, up to rounding."""
    for number in (number for line in table for number in line):
        if not -_ROUNDING <= number <= 1 + _ROUNDING:
            raise refuse(f"{name} must lie in [0, 1]; got {number!r}")


def _check_stability(value: Any) -> None:
    whole = isinstance(value, dict) and set(value) == set(ROWS)
    if not whole or any(not isinstance(v, dict) or set(v) != {"layer", "model"} for v in value.values()):
        raise refuse(f"stability must hold layer and model for {' and '.join(ROWS)}; got {value!r}")
    for rows in ROWS:
        for scope, number in value[rows].items():
            known = isinstance(number, (int, float)) and not isinstance(number, bool)
            if number is not None and not (known and -1 <= number <= 1):
                raise refuse(f"stability.{rows}.{scope} must lie in [-1, 1]; got {number!r}")


def check_votes(rank_votes: Any, facts: ModelFacts, samples: int) -> None:
    """Raises ValueError unless the rank votes have their shape and every row and rank has one vote a sample."""
    if not isinstance(rank_votes, dict) or set(rank_votes) != set(ROWS):
        got = sorted(map(str, rank_votes)) if isinstance(rank_votes, dict) else type(rank_votes).__name__
        raise refuse(f"rank_votes must hold {' and '.join(ROWS)}; got {got}")
    for rows, count in zip(ROWS, (facts.Hkv, facts.Hq), strict=True):
        check_array(f"rank_votes.{rows}", rank_votes[rows], (facts.L, count, count), int)
        for layer, votes in enumerate(rank_votes[rows]):
            if min(map(min, votes)) < 0 or {sum(line) for line in (*votes, *zip(*votes, strict=True))} != {samples}:
                raise refuse(f"rank_votes.{rows}[{layer}] must sum to run.samples in every row and every rank")


def read_record(cls: type, name: str, value: Any) -> Any:
    """A dataclass of ints, strings and dicts from an object of JSON; fields with a default may be missing."""
    known = {f.name for f in fields(cls)}
    needed = {f.name for f in fields(cls) if f.default is MISSING}
    if not isinstance(value, dict) or not needed <= value.keys() <= known:
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise refuse(f"{name} must hold {', '.join(sorted(known))}; got {got}")
    for f in fields(cls):
        kind = {"int": int, "str": str}.get(f.type, dict)
        if f.name in value and (not isinstance(value[f.name], kind) or isinstance(value[f.name], bool)):
            raise refuse(f"{name}.{f.name} must be {kind.__name__}; got {value[f.name]!r}")
    return cls(**value)
