# SPDX-License-Identifier: Apache-2.0
"""TOVA: the tokens that the last query looks at, one set for all heads of a layer (arXiv 2401.06104)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from uncomp.policies.base import Policy, register_policy
from uncomp.types import DecodeRule
from uncomp.view import LayerView


@register_policy
class TOVA(Policy):
    """s_j = mean over all query heads of the layer of p[n - 1, j]; every row keeps the same tokens.

    In decoding the token with the smallest weight of the newest query leaves; the newest token itself stays.
    """

    name = "tova"
    defaults: ClassVar = {"window": 1, "pool_width": 1}

    def __init__(self, config, shape) -> None:
        super().__init__(config, shape)
        if config.pool_width != 1:
            raise ValueError(f"uncomp: pool_width of tova must be 1: weights are not pooled; got {config.pool_width}")

    def score(self, view: LayerView) -> Tensor:
        """[R, columns] float32, the same in all rows of a sequence."""
        scores = view.window_scores(1).view(view.batch, self.shape.rows, view.columns)
        return scores.mean(1, keepdim=True).expand(-1, self.shape.rows, -1).flatten(0, 1)

    def decode_rule(self) -> DecodeRule:
        """The smallest weight of the newest query."""
        return DecodeRule("last", newest=self.config.window, sinks=self.config.sinks)
