# SPDX-License-Identifier: Apache-2.0
"""How a prompt is shortened between stages of layers: the options of hidden-state pruning, checked on construction."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from uncomp import stages as layer_stages
from uncomp.fields import CheckedFields

MOST_QUERIES = 64  # last queries that one call of window_scores takes


@dataclass(frozen=True)
class PrefillPruning(CheckedFields):
    """How many tokens of a prompt go through the layers of each stage, and who chooses them.

    Args:
        stages: first layers of the stages, ascending from 0; "profile": those of a profile's layer curve; "fixed": the
            published ones, of 32 or 40 layers.
        profile: for stages="profile": a HeadProfile file, or the name of one that comes with the package; default: the
            configuration's, else the one that comes with the package for this very model.
        curve: what a profile's stages follow: "entropy" (summed over the query heads) or "erank" (mean effective rank).
        threshold: drop of the curve at which a stage begins; default min(1, query heads / 32) for "entropy".
        num_stages: instead of a threshold: as many stages, by the largest drops.
        n_min: tokens of the last stage, an int, or a share of the prompt, a float in (0, 1]; default 1536, published.
        n_max: tokens that the numbers fall from, likewise; "prompt" (default): all of it.
        n_step: tokens that every stage has fewer than the one before; default: the difference in equal steps.
        hidden_queries: last queries whose attention chooses the tokens; default 8.
        prune_first: the first stage is cut to its number too, behind its first layer, as the paper's reference does.
    Raises:
        ValueError: names the field, what is allowed and what came.
    Source: docs/method.md "Hidden-state pruning".
    """

    stages: str | tuple[int, ...] = "profile"
    profile: str | None = None
    curve: Literal["entropy", "erank"] = "entropy"
    threshold: float | None = None
    num_stages: int | None = None
    n_min: int | float = layer_stages.N_MIN
    n_max: int | float | str = "prompt"
    n_step: int | None = None
    hidden_queries: int = 8
    prune_first: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stages, list):
            object.__setattr__(self, "stages", tuple(self.stages))
        if isinstance(self.profile, os.PathLike):
            object.__setattr__(self, "profile", os.fspath(self.profile))
        self._stages()
        self._tokens()
        self._require("hidden_queries", _whole(self.hidden_queries, 1, MOST_QUERIES), f"1 to {MOST_QUERIES} queries")
        self._require("prune_first", isinstance(self.prune_first, bool), "True or False")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["stages"] = list(self.stages) if isinstance(self.stages, tuple) else self.stages
        return values

    # ---- checks
    def _stages(self) -> None:
        stages = self.stages
        if isinstance(stages, str):
            self._require("stages", stages in ("profile", "fixed"), '"profile", "fixed" or ascending layers from 0')
        else:
            listed = isinstance(stages, tuple) and all(_whole(s, 0, 2**31) for s in stages)
            rises = listed and stages[:1] == (0,) and all(a < b for a, b in pairwise(stages))
            self._require("stages", rises, '"profile", "fixed" or ascending layers from 0')
        self._require("curve", self.curve in ("entropy", "erank"), "one of 'entropy', 'erank'")
        drop = self.threshold
        number = isinstance(drop, (int, float)) and not isinstance(drop, bool) and 0 <= drop < math.inf
        self._require("threshold", drop is None or number, "a drop of at least 0")
        self._require("num_stages", self.num_stages is None or _whole(self.num_stages, 1, 2**31), "at least 1")
        self._require("num_stages", drop is None or self.num_stages is None, "left out where threshold is given")
        self._require(
            "profile", self.profile is None or (isinstance(self.profile, str) and self.profile), "the path of a profile"
        )
        if stages != "profile":
            for name, plain in (("profile", None), ("threshold", None), ("num_stages", None), ("curve", "entropy")):
                self._require(name, getattr(self, name) == plain, 'left out where stages is not "profile"')
        elif self.curve == "erank":
            given = drop is not None or self.num_stages is not None
            self._require("threshold", given, 'given, or num_stages, where curve is "erank"')

    def _tokens(self) -> None:
        for name in ("n_min", "n_max"):
            value = getattr(self, name)
            share = isinstance(value, float) and 0 < value <= 1
            allowed = "tokens (an integer from 1) or a share (a float in (0, 1])"
            prompt = name == "n_max" and value == "prompt"
            self._require(
                name, _whole(value, 1, 2**31) or share or prompt, allowed + (', or "prompt"' * (name == "n_max"))
            )
        if type(self.n_min) is type(self.n_max):
            self._require("n_min", self.n_min <= self.n_max, f"at most n_max ({self.n_max})")
        self._require("n_step", self.n_step is None or _whole(self.n_step, 1, 2**31), "at least 1 token")


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
