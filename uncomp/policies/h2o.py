# SPDX-License-Identifier: Apache-2.0
"""H2O: heavy hitters by accumulated attention, and the newest tokens (arXiv 2306.14048)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from uncomp.grouping import int32_on
from uncomp.policies.base import Policy, register_policy
from uncomp.types import DecodeRule
from uncomp.view import LayerView


@register_policy
class H2O(Policy):
    """Half of a row's b tokens are the newest, the others those with the largest attention mass of all queries so far:

        s_j = sum_i p[i, j]        over every query i >= j of prompt and answer

    In decoding every step adds its weights, and the smallest sum outside the newest half leaves.
    """

    name = "h2o"
    defaults: ClassVar = {"pool_width": 1}

    def __init__(self, config, shape) -> None:
        super().__init__(config, shape)
        if config.pool_width != 1:
            raise ValueError(f"uncomp: pool_width of h2o must be 1: sums are not pooled; got {config.pool_width}")

    def score(self, view: LayerView) -> Tensor:
        """[R, columns] float32, accumulated mass; +inf for the newest half of what the row may hold."""
        scores = view.accumulated_scores(reduce=self.config.reduce_scores)
        half = [total // self.shape.rows // 2 for total in self.totals(view.layer, view.seen)]
        newest = int32_on(view.device, tuple(half)).repeat_interleave(self.shape.rows)
        column = torch.arange(view.columns, device=view.device)
        return scores.masked_fill(column >= (view.length - newest).unsqueeze(1), float("inf"))

    def decode_rule(self) -> DecodeRule:
        """The smallest sum; half of the row is safe."""
        return DecodeRule("running", newest=self.config.window, newest_share=0.5, sinks=self.config.sinks)

    def seed_mass(self, view: LayerView, scores: Tensor) -> Tensor:
        """[R, columns] float32, the sums themselves."""
        return view.accumulated_scores(reduce=self.config.reduce_scores)
