# SPDX-License-Identifier: Apache-2.0
"""Every knob of a compressed cache, checked on construction. docs/method.md defines what each one computes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from uncomp.fields import CheckedFields
from uncomp.prefill import PrefillPruning

DEFAULT_BUDGET = 384  # tokens
MAX_BUDGET = 2**24  # tokens; rows are made this long, so more is a slip of the hand
_TUNED = {"groups": 8, "group_scope": "model", "spread": "2/3", "reduce_scores": "max", "value_norm": True}
_PRESETS = {  # values of fields left at None, and of the policy's own options
    "tuned": (_TUNED, {}),
    "tuned-hits": (_TUNED, {"allocator": "groups*layer_topk"}),
}
_FALLBACK = {  # what a field left at None becomes, after the policy's own default
    "window": 8,
    "sinks": 0,
    "pool": "max",
    "pool_width": 7,
    "group_scope": "layer",
    "layer_shape": "uniform",
    "reduce_scores": "mean",
    "value_norm": False,
}
_policy_defaults: dict[str, Mapping[str, Any]] = {}


def register_policy_defaults(name: str, defaults: Mapping[str, Any]) -> None:
    """Makes a policy known by name, with the values its fields take where the user leaves them at None."""
    unknown = sorted(set(defaults) - set(_FALLBACK))
    if unknown:
        raise ValueError(f"uncomp.register_policy: defaults may set {', '.join(_FALLBACK)}; got {', '.join(unknown)}")
    _policy_defaults[name] = dict(defaults)


def known_policies() -> list[str]:
    """Names that UncompConfig(policy=...) takes."""
    return sorted(_policy_defaults)


@dataclass(frozen=True)
class UncompConfig(CheckedFields):
    """How a model's KV cache is compressed.

    A field left at None takes the policy's default, then the one named here. Tokens are real tokens; padding is never
    counted.

    Args:
        policy: a registered policy: `uncomp.known_policies()`.
        budget: int: mean tokens a row (a KV head of a sequence) stores; float in (0, 1]: share of the prompt that
            stays. Default 384, or what a named `shape` says. 1.0 stores everything.
        compression_ratio: share removed, in [0, 1): another way to say budget = 1 - ratio.
        rows: "kv_head" (native GQA storage) or "query_head" (the paper's reference: g times the memory).
        profile: "online" (order of heads from this prompt's queries), a HeadProfile file, or the name of one that comes
            with the package.
        groups: groups of rows G; default min(2, rows).
        group_scope: rows are grouped in each "layer" (default) or over the whole "model" at once.
        order: "ascending" (more tokens for more entropy), or the ablations "reverse" and "random".
        shape: "linear", the name of a preset ("g8", "linear(640,74,8)", ...), explicit values, lowest entropy
            first, or "entropy": no groups, every row in proportion to its own entropy.
        spread: x of the linear shape in [0, 1); default 1/3 for two groups, else 2/3. With shape="entropy" weights
            reach from 1 - x (lowest entropy) to 1 + x; default: the entropies themselves.
        extreme: low limit N of two groups; the high group shares the rest.
        delete_heads: rows of every layer, lowest in the order, that store nothing and copy the output of another row.
        delete_total: True: the rows that stay share what all rows would have had; False: each has the mean.
        layer_shape: "uniform" (default) or "pyramid".
        entropy_top: eigenvalues k that enter the entropy; default head_dim // 4, or the profile's. "elbow": that of a
            profile's spectrum.
        entropy_kind: "truncated", "renormalized" or "renyi2"; or "variance", to compare the order with.
        reduce_entropy: "mean" or "max" over the query heads of a row.
        window: last queries that score, newest tokens that stay (W); default 8.
        sinks: first tokens that stay; default 0.
        pool, pool_width: "max" or "avg" and an odd width, over neighbouring scores; default max, 7.
        reduce_scores: "mean", "sum" or "max" over the query heads of a row.
        value_norm: scores are multiplied by the norm of the token's value.
        vote_window: last queries whose votes decide what a decode step evicts; default min(8, window).
        decode: "evict" (constant length) or "grow" (new tokens are appended).
        extend: what a later turn does: "reselect" (back to the plan) or "append" (keep all new tokens).
        recompress_from: with decode="grow", a turn of fewer new tokens is appended without compressing.
        max_new_tokens: with decode="grow", free slots a row gets; more are made room for in steps of a half.
        skip_sliding: leave sliding-window layers uncompressed instead of refusing the model.
        seed: for order="random" and policy="random".
        preset: "tuned" fills fields left at None with the combination that docs/policies.md measures; "tuned-hits", of
            policy="uncomp" alone, further weighs each row by how many of its layer's best tokens it has.
        graph: "auto" records decode steps in CUDA graphs where that is possible; "off" never does.
        compile: "step" compiles decode steps by torch.compile before they are recorded: faster steps, after a warm-up
            of half a minute. Until the patch is removed, projections of one input share one matrix, in which their
            weights are views: a step of several sequences multiplies once.
        prefill: a PrefillPruning: tokens of a prompt leave the computation between stages of layers. Default: none do,
            but with policy="uncomp_stage", which is "uncomp" with PrefillPruning().
        policy_options: further named values of the policy (for instance {"alpha": 0.2} of adakv).

    Raises:
        ValueError: names the field, what is allowed and what came.
    """

    policy: str = "uncomp"
    budget: int | float | None = None
    compression_ratio: float | None = None
    rows: Literal["kv_head", "query_head"] = "kv_head"
    profile: str = "online"
    groups: int | None = None
    group_scope: Literal["layer", "model"] | None = None
    order: Literal["ascending", "reverse", "random"] = "ascending"
    shape: str | tuple[int, ...] = "linear"
    spread: float | str | None = None
    extreme: int | None = None
    delete_heads: int = 0
    delete_total: bool = True
    layer_shape: Literal["uniform", "pyramid"] | None = None
    entropy_top: int | Literal["elbow"] | None = None
    entropy_kind: Literal["truncated", "renormalized", "renyi2", "variance"] = "truncated"
    reduce_entropy: Literal["mean", "max"] = "mean"
    window: int | None = None
    sinks: int | None = None
    pool: Literal["max", "avg"] | None = None
    pool_width: int | None = None
    reduce_scores: Literal["mean", "sum", "max"] | None = None
    value_norm: bool | None = None
    vote_window: int | None = None
    decode: Literal["evict", "grow"] = "evict"
    extend: Literal["reselect", "append"] = "reselect"
    recompress_from: int = 64
    max_new_tokens: int = 512
    skip_sliding: bool = False
    seed: int = 0
    preset: Literal["tuned", "tuned-hits"] | None = None
    graph: Literal["auto", "off"] = "auto"
    compile: Literal["off", "step"] = "off"
    prefill: PrefillPruning | None = None
    policy_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._one_of("policy", self.policy, known_policies())
        self._one_of("preset", self.preset, (None, *_PRESETS))
        if self.preset is not None:
            self._fill_preset(*_PRESETS[self.preset])
        self._fill(_policy_defaults[self.policy])
        self._fill(_FALLBACK)
        if isinstance(self.shape, list):
            object.__setattr__(self, "shape", tuple(self.shape))
        if isinstance(self.profile, os.PathLike):
            object.__setattr__(self, "profile", os.fspath(self.profile))
        self._prefill()
        self._choices()
        self._numbers()
        self._budget()
        if self.vote_window is None:
            object.__setattr__(self, "vote_window", min(8, self.window))
        self._require(
            "vote_window", 1 <= self.vote_window <= self.window, f"an integer from 1 to window ({self.window})"
        )

    # ---- what the config says, ready to use
    @property
    def floor(self) -> int:
        """Tokens every row keeps in any case: window and sinks."""
        return self.window + self.sinks

    @property
    def keeps_all(self) -> bool:
        """True if nothing is ever dropped: the cache appends."""
        return self.policy == "full" or (isinstance(self.budget, float) and self.budget == 1.0)

    @property
    def grows(self) -> bool:
        """True if decoding appends instead of evicting."""
        return self.decode == "grow" or self.keeps_all

    # ---- to and from files
    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["compression_ratio"] = None  # said by budget
        values["policy_options"] = dict(self.policy_options)
        values["prefill"] = None if self.prefill is None else self.prefill.to_dict()
        values["shape"] = list(self.shape) if isinstance(self.shape, tuple) else self.shape
        return values

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `uncomp_config.json` into a folder, which is made if missing."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        beside = path / "uncomp_config.json.tmp"
        beside.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        beside.replace(path / "uncomp_config.json")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> UncompConfig:
        """Reads `uncomp_config.json` from a folder."""
        return cls.from_dict(json.loads((Path(folder) / "uncomp_config.json").read_text()))

    # ---- checks
    def _fill(self, defaults: Mapping[str, Any]) -> None:
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _fill_preset(self, fields: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        ours = self.policy in ("uncomp", "uncomp_stage")
        self._require("preset", ours or not options, f"left out or 'tuned' where policy is {self.policy!r}")
        self._fill(fields)
        if options and isinstance(self.policy_options, Mapping):
            object.__setattr__(self, "policy_options", {**options, **self.policy_options})

    def _one_of(self, name: str, value: Any, allowed: Any) -> None:
        self._require(name, value in allowed, "one of " + ", ".join(repr(a) for a in allowed))

    def _prefill(self) -> None:
        if isinstance(self.prefill, Mapping):
            object.__setattr__(self, "prefill", PrefillPruning.from_dict(self.prefill))
        if self.policy == "uncomp_stage" and self.prefill is None:
            object.__setattr__(self, "prefill", PrefillPruning())
        self._require("prefill", isinstance(self.prefill, (PrefillPruning, type(None))), "a PrefillPruning or None")

    def _choices(self) -> None:
        for name, hint in (
            ("rows", ("kv_head", "query_head")),
            ("group_scope", ("layer", "model")),
            ("order", ("ascending", "reverse", "random")),
            ("layer_shape", ("uniform", "pyramid")),
            ("entropy_kind", ("truncated", "renormalized", "renyi2", "variance")),
            ("reduce_entropy", ("mean", "max")),
            ("pool", ("max", "avg")),
            ("reduce_scores", ("mean", "sum", "max")),
            ("decode", ("evict", "grow")),
            ("extend", ("reselect", "append")),
            ("graph", ("auto", "off")),
            ("compile", ("off", "step")),
            ("value_norm", (True, False)),
            ("skip_sliding", (True, False)),
            ("delete_total", (True, False)),
        ):
            self._one_of(name, getattr(self, name), hint)
        self._require(
            "profile", isinstance(self.profile, str) and self.profile != "", '"online" or the path of a profile'
        )
        self._require("compile", self.compile == "off" or self.graph != "off", '"off" where graph is "off"')
        self._require("policy_options", isinstance(self.policy_options, Mapping), "a mapping of names to values")
        self._require("shape", isinstance(self.shape, (str, tuple)), "a name or a sequence of integers")

    def _numbers(self) -> None:
        for name, low, high in (
            ("window", 1, 64),
            ("sinks", 0, 2**20),
            ("pool_width", 1, 129),
            ("recompress_from", 1, 2**31),
            ("max_new_tokens", 1, 2**31),
            ("seed", 0, 2**63),
            ("groups", 1, 16384),
            ("entropy_top", 1, 256),
            ("vote_window", 1, 64),
            ("extreme", 1, 2**31),
            ("delete_heads", 0, 16383),
        ):
            value = getattr(self, name)
            if value is None and name in ("groups", "entropy_top", "vote_window", "extreme"):
                continue
            if name == "entropy_top" and value == "elbow":
                self._require("profile", self.profile != "online", 'a file where entropy_top is "elbow"')
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            self._require(name, whole and low <= value <= high, f"an integer from {low} to {high}")
        self._require("pool_width", self.pool_width % 2 == 1, "odd")

    def _budget(self) -> None:
        ratio = self.compression_ratio
        if ratio is not None:
            self._require("compression_ratio", isinstance(ratio, (int, float)) and 0 <= ratio < 1, "a share in [0, 1)")
            self._require("compression_ratio", self.budget is None, "left out where budget is given")
            object.__setattr__(self, "budget", float(1 - Fraction(str(ratio))))
            object.__setattr__(self, "compression_ratio", None)
        if self.budget is None:
            if self.shape in ("linear", "entropy") or self.policy not in ("uncomp", "uncomp_stage"):
                object.__setattr__(self, "budget", DEFAULT_BUDGET)
            else:
                return  # a named shape carries its own limits
        budget = self.budget
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise ValueError(f"uncomp.UncompConfig: budget must be an int (tokens) or a float (share); got {budget!r}")
        if isinstance(budget, float):
            self._require("budget", 0 < budget <= 1, "a share in (0, 1], or an int for tokens")
        elif self.policy != "full":
            self._require("budget", budget >= self.floor, f"at least window + sinks = {self.floor} tokens")
            self._require("budget", budget <= MAX_BUDGET, f"at most {MAX_BUDGET} tokens, or 1.0 for all of them")
