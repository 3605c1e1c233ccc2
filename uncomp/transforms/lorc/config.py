# SPDX-License-Identifier: Apache-2.0
"""Every knob of LoRC, checked on construction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from uncomp.fields import CheckedFields

STEP = 16  # channels; ranks are multiples of it, as tiles of tensor cores are


@dataclass(frozen=True)
class LorcConfig(CheckedFields):
    """How the key and value projections of a model are replaced by factors of low rank.

    Args:
        rho: mean share of the head dim that stays, in (0, 1]; or a pair, for keys and for values.
        d_min_frac: share that the layer with the smallest rank has at least, in (0, 1]; the schedule "uniform" has no
            use for it.
        schedule: "cumulative_condition" (shallow layers keep more, by condition numbers), "linear" (a ramp over the
            depth) or "uniform".
        kappa: condition number of a layer: of its whole "layer" matrix, or "per_head_mean" of the logarithms.
        threshold: layers whose cumulative log condition number lies further than this above the last layer's are left
            as they are, and the others share `rho`; default: none are.
        rank_k, rank_v: ranks instead of a schedule: one number for all layers, or one a layer; multiples of 16.
        key_mode: "rebuild" (keys are made again from what is stored, then rotated) or "absorb" (into the query
            projection; exact, for models without rotary positions and without normalised keys).
        granularity: what has factors of its own: each "head", "group:s" (s heads one behind the other share latents of
            s times the rank) or the whole "layer". Shared ones err less; a cache then stores them once for s heads, so
            under `uncomp.patch` only policies that keep the same tokens for all of them can run.
        whiten: None (plain SVD) or "calib" (errors are weighed by calibration tokens, which `compress` then needs).
        exact_prefill: under `uncomp.patch` prompts run with the original weights, which then stay in memory, and what
            is stored of them is of low rank; later tokens, and models that are not patched, run with the factors.
        svd: "exact" or "randomised" (a seeded range finder with two power iterations).
        seed: of the randomised one.

    Raises:
        ValueError: names the field, what is allowed and what came.
    """

    rho: float | tuple[float, float] = 0.575
    d_min_frac: float = 0.25
    schedule: Literal["cumulative_condition", "linear", "uniform"] = "cumulative_condition"
    kappa: Literal["layer", "per_head_mean"] = "layer"
    threshold: float | None = None
    rank_k: int | tuple[int, ...] | None = None
    rank_v: int | tuple[int, ...] | None = None
    key_mode: Literal["rebuild", "absorb"] = "rebuild"
    granularity: str = "head"
    whiten: Literal["calib"] | None = None
    exact_prefill: bool = False
    svd: Literal["exact", "randomised"] = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rho", "rank_k", "rank_v"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        rho = self.rho if isinstance(self.rho, tuple) else (self.rho, self.rho)
        self._require("rho", len(rho) == 2 and all(map(_share, rho)), "a share in (0, 1], or a pair for keys, values")
        self._require("d_min_frac", _share(self.d_min_frac), "a share in (0, 1]")
        for name, allowed in (
            ("schedule", ("cumulative_condition", "linear", "uniform")),
            ("kappa", ("layer", "per_head_mean")),
            ("key_mode", ("rebuild", "absorb")),
            ("whiten", (None, "calib")),
            ("svd", ("exact", "randomised")),
        ):
            wanted = "one of " + ", ".join(map(repr, allowed))
            self._require(name, getattr(self, name) in allowed, wanted)
        self._require("exact_prefill", isinstance(self.exact_prefill, bool), "True or False")
        wanted = '"head", "layer" or "group:s" with s of at least 2'
        self._require("granularity", _granularity(self.granularity), wanted)
        self._require(
            "key_mode", self.key_mode == "rebuild" or self.granularity == "head", '"rebuild" for shared latents'
        )
        wanted = "left out where heads share latents"
        self._require("threshold", self.threshold is None or self.granularity == "head", wanted)
        self._require("svd", self.svd == "exact" or self.whiten is None, '"exact" where whiten is given')
        for name in ("rank_k", "rank_v"):
            ranks = getattr(self, name)
            ranks = (ranks,) if isinstance(ranks, int) else ranks
            wanted = f"a positive multiple of {STEP}, or one a layer"
            self._require(name, ranks is None or (isinstance(ranks, tuple) and all(map(is_rank, ranks))), wanted)
        given = sum(rank is not None for rank in (self.rank_k, self.rank_v))
        self._require("threshold", self.threshold is None or _positive(self.threshold), "a number of at least 0")
        self._require("threshold", self.threshold is None or given < 2, "left out where both ranks are given")
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        self._require("seed", whole and 0 <= self.seed < 2**63, "an integer from 0 to 2**63 - 1")
        for side, name, share in zip("kv", ("rank_k", "rank_v"), rho, strict=True):
            low = self.schedule == "uniform" or getattr(self, name) is not None or share >= self.d_min_frac
            self._require("rho", low, f"at least d_min_frac ({self.d_min_frac}) for {side}")

    @property
    def shares(self) -> tuple[float, float]:
        """rho of keys and of values."""
        return self.rho if isinstance(self.rho, tuple) else (self.rho, self.rho)

    def heads_together(self, heads: int) -> int:
        """KV heads that share latents, in a model of `heads`.

        Raises:
            ValueError: groups that do not divide the heads.
        """
        if self.granularity in ("head", "layer"):
            return 1 if self.granularity == "head" else heads
        size = int(self.granularity.removeprefix("group:"))
        self._require("granularity", heads % size == 0, f"groups that divide the model's {heads} key/value heads")
        return size

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def given_ranks(name: str, ranks: int | Sequence[int], layers: int, head_dim: int) -> list[int]:
    """Explicit ranks, one a layer, if they fit the model.

    Raises:
        ValueError: not one a layer, or above the head dim.
    """
    found = [ranks] * layers if isinstance(ranks, int) else list(ranks)
    if len(found) != layers:
        raise ValueError(
            f"uncomp.LorcConfig: {name} must have {layers} ranks, one a compressed layer; got {len(found)}"
        )
    if max(found) > head_dim:
        raise ValueError(f"uncomp.LorcConfig: {name} must be at most the head dim {head_dim}; got {max(found)}")
    return found


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _granularity(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    size = value.removeprefix("group:")
    return value in ("head", "layer") or (
        size != value and size.isascii() and size.isdecimal() and size[0] != "0" and int(size) > 1
    )


def _share(value: Any) -> bool:
    return _number(value) and 0 < value <= 1


def _positive(value: Any) -> bool:
    return _number(value) and value >= 0


def is_rank(value: Any) -> bool:
    """Whether a value is a rank that kernels take."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % STEP == 0
