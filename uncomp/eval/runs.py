# SPDX-License-Identifier: Apache-2.0
"""What one call of `uncomp eval` runs: policies times budgets times question modes, each with a folder of its own."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uncomp.config import UncompConfig
from uncomp.eval.folder import RunFolder, run_name

MODES = ("aware", "agnostic")
STANDARD = ("full", "streaming_llm", "snapkv", "pyramidkv", "adakv", "uncomp", "uncomp:order=random")  # of every table
RANDOM_SEEDS = 5
_GROUPS = {"options": "policy_options", "prefill": "prefill"}
_ELSEWHERE = ("policy", "budget", "compression_ratio", "policy_options", "prefill")  # said in other ways
_HOW = ("graph", "compile", "max_new_tokens")  # fields of a config that change no result


@dataclass(frozen=True)
class Run:
    """One policy at one budget in one question mode.

    Fields:
        policy: as the user wrote it.
        budget: tokens or a share; None where everything is stored.
        mode: one of `MODES`.
        config: how to compress.
    """

    policy: str
    budget: int | float | None
    mode: str
    config: UncompConfig

    @property
    def name(self) -> str:
        """Name of its folder."""
        return run_name(self.policy, self.budget, self.mode)

    def settings(self) -> dict[str, Any]:
        """What a summary says of it, as plain values."""
        return {
            "policy": self.policy,
            "budget": self.budget,
            "mode": self.mode,
            "window": self.config.window,
            "pool": f"{self.config.pool} {self.config.pool_width}",
            "decode": self.config.decode,
            "seed": self.config.seed,
        }

    def folder(self, out: Path, common: dict[str, Any]) -> RunFolder:
        """Its folder under OUT/TASK; `common`: what else decides a record's result."""
        config = {name: value for name, value in self.config.to_dict().items() if name not in _HOW}
        return RunFolder(out / self.name, {**common, "mode": self.mode, "cache": config})


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """A policy's name and the fields behind it: "uncomp:groups=8,order=random".

    Values of a list are joined by "+": shape=512+256. A policy's own are named options.NAME, those of a PrefillPruning
    prefill.NAME.

    Raises:
        ValueError: a field that UncompConfig does not have, or a value that it cannot have.
    """
    name, _, rest = text.partition(":")
    kinds = typing.get_type_hints(UncompConfig)
    fields: dict[str, Any] = {}
    keys: list[str] = []
    for pair in rest.split(",") if ":" in text else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"uncomp eval: --policy must be NAME:field=value,...; got {text}")
        if key in keys:
            raise ValueError(f"uncomp eval: --policy {text} names {key} twice")
        keys.append(key)
        group, dot, inner = key.partition(".")
        if dot and group in _GROUPS:
            fields.setdefault(_GROUPS[group], {})[inner] = _list(value) if inner == "stages" else _plain(value)
            continue
        if key not in kinds or key in _ELSEWHERE:
            known = ", ".join(k for k in kinds if k not in _ELSEWHERE)
            raise ValueError(f"uncomp eval: --policy {text}: unknown field {key}; known: {known}")
        fields[key] = _typed(key, kinds[key], value)
    return name, fields


def _typed(key: str, kind: Any, text: str) -> Any:
    if key == "shape":
        return _list(text)
    kinds = typing.get_args(kind) or (kind,)
    if kind is bool or bool in kinds:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"uncomp eval: --policy field {key} must be true or false; got {text}")
        return text.lower() == "true"
    return _plain(text) if {int, float} & set(kinds) else text


def _list(text: str) -> Any:
    parts = text.split("+")
    return tuple(int(p) for p in parts) if all(p.isdigit() for p in parts) else text


def _plain(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def standard() -> list[str]:
    """What `--policy standard` stands for: the policies that every table names, random groups under several seeds."""
    drawn = [f"{STANDARD[-1]},seed={seed}" for seed in range(RANDOM_SEEDS)]
    return [*STANDARD[:-1], *drawn]


def plan(
    policies: Sequence[str],
    budgets: Sequence[int | float],
    modes: Sequence[str],
    *,
    seed: int,
    skip_sliding: bool = False,
    shared: dict[str, Any] | None = None,
) -> list[Run]:
    """Every run of a call; `full` once, and first, because the others are compared with it, then budget by budget: what
    is stopped leaves whole blocks of a table behind.

    Args:
        policies: as `parse_policy` takes them, or "standard". budgets: for each of them.
        seed: for policies that draw, where the policy names none.
        skip_sliding: leave sliding-window layers alone, for all.
        shared: fields for all policies; for `full` the decode rule alone.
    Raises:
        ValueError: a bad policy, field or budget, a policy that names another value of a shared field, the same run
            twice.
    """
    texts = [name for given in policies for name in (standard() if given == "standard" else [given])]
    full = [text for text in texts if parse_policy(text)[0] == "full"]
    runs: list[Run] = []
    for text, budget in [
        *((text, None) for text in full),
        *((text, budget) for budget in budgets for text in texts if text not in full),
    ]:
        name, fields = parse_policy(text)
        fixed = {key: value for key, value in (shared or {}).items() if name != "full" or key == "decode"}
        for key, value in fixed.items():
            if fields.get(key, value) != value:
                raise ValueError(f"uncomp eval: --policy {text} and --{key.replace('_', '-')} {value} differ")
        given = {"seed": seed, "skip_sliding": skip_sliding, **fields, **fixed}
        config = UncompConfig(policy=name, budget=1.0 if budget is None else budget, **given)
        for mode in modes:
            agnostic = replace(config, extend="append") if mode == "agnostic" else config
            runs.append(Run(text, budget, mode, agnostic))
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"uncomp eval: policies and budgets give the run {twice} twice")
    return runs


def with_room(config: UncompConfig, tokens: int) -> UncompConfig:
    """The config with free slots for as many new tokens where rows grow."""
    return dataclasses.replace(config, max_new_tokens=max(1, tokens))
