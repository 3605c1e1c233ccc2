# SPDX-License-Identifier: Apache-2.0
"""The contract of an eviction policy, and the registry by name.

A policy says how many tokens each row stores (`limits`), which ones (`score`), and what leaves at a decode step
(`decode_rule`). It sees bare tensors through a LayerView; selection, packing and the cache itself are shared by all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from uncomp import budget
from uncomp.config import UncompConfig, register_policy_defaults
from uncomp.types import CacheShape, DecodeRule, PlanRequest
from uncomp.view import LayerView


class Policy:
    """Base of all policies, and by itself a policy: every row the same budget, tokens by the last queries.

    Subclass it, give it a `name`, override what differs, and decorate it with `register_policy`.

    Attributes:
        name: how UncompConfig(policy=...) calls it.
        defaults: values of config fields left at None.
        options: names that policy_options may hold, with their defaults.
        blind: scores do not depend on what the model attends to, so that rows may stand for several heads.
        scope: "layer", or "model" if limits span layers: all layers then stay dense until the last one.
        beta: how steep layer_shape="pyramid" is.
        delete_heads: rows of every layer and sequence that store nothing; `deleted_rows` says which, and `score` and
            `limits` then see the others only.
    """

    name: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]] = {}
    options: ClassVar[Mapping[str, Any]] = {}
    blind: ClassVar[bool] = False
    scope: str = "layer"
    beta: float = 20.0
    delete_heads: int = 0

    def __init__(self, config: UncompConfig, shape: CacheShape) -> None:
        unknown = sorted(set(config.policy_options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise ValueError(f"uncomp: policy {self.name} has no option {', '.join(unknown)}; known: {known}")
        self.config, self.shape = config, shape
        self.option = {**self.options, **config.policy_options}

    def statistic(self, view: LayerView) -> Tensor | None:
        """[B, rows] float32, measured once on the prompt; None if the policy needs none."""
        return None

    def deleted_rows(self, layer: int, statistic: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """[B, rows] bool, exactly `delete_heads` rows of each sequence."""
        raise NotImplementedError(f"uncomp: policy {self.name} sets delete_heads and must say deleted_rows")

    def score(self, view: LayerView) -> Tensor:
        """[R, columns] float32, larger means keep; NaN is the smallest. Pooling follows in selection."""
        config = self.config
        return view.window_scores(config.window, reduce=config.reduce_scores, value_norm=config.value_norm)

    def totals(self, layer: int, lengths: list[int]) -> list[int]:
        """[B] tokens that the rows of a layer share, for prompts of these lengths. Host numbers only."""
        config = self.config
        means = [budget.mean_tokens(config.budget, n, config.floor) for n in lengths]
        if config.layer_shape != "uniform":
            layers = self.shape.num_layers
            means = [
                budget.layer_means(b, n, layers, config.layer_shape, config.floor, self.beta)[layer]
                for b, n in zip(means, lengths, strict=True)
            ]
        return [self.shape.rows * b for b in means]

    def limits(self, request: PlanRequest) -> Tensor:
        """[B, N] int32 tokens that each row may hold; a sequence's row sums to its total exactly."""
        rows = self.shape.rows * len(request.layers)
        group = torch.zeros(len(request.lengths), rows, dtype=torch.int32, device=request.device)
        return budget.limits(group, [1], request.lengths, request.totals, self.config.floor)

    def decode_rule(self) -> DecodeRule:
        """What leaves when a token enters a full row (decode="evict")."""
        return DecodeRule(newest=self.config.window, sinks=self.config.sinks)

    def seed_mass(self, view: LayerView, scores: Tensor) -> Tensor:
        """[R, columns] float32: what a decode rule "running" or "last" starts from."""
        return scores


_policies: dict[str, type[Policy]] = {}
P = TypeVar("P", bound=type[Policy])


def register_policy(cls: P) -> P:
    """Class decorator: makes a Policy known by its name.

    Raises:
        ValueError: no name, or a name that is taken by another class.
    """
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise TypeError(f"uncomp.register_policy: a policy must be a subclass of uncomp.Policy; got {cls!r}")
    if not cls.name:
        raise ValueError(f"uncomp.register_policy: {cls.__name__} must have a name")
    taken = _policies.get(cls.name)
    if taken is not None and taken.__qualname__ != cls.__qualname__:
        raise ValueError(f"uncomp.register_policy: name {cls.name!r} is taken by {taken.__qualname__}")
    register_policy_defaults(cls.name, cls.defaults)
    _policies[cls.name] = cls
    return cls


def make_policy(config: UncompConfig, shape: CacheShape) -> Policy:
    """The policy that the config names, for a model of this shape.

    Raises:
        ValueError: what the config asks does not fit the model (more groups than rows, an unknown shape or option).
    """
    return _policies[config.policy](config, shape)
