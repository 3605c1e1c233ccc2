# SPDX-License-Identifier: Apache-2.0
"""PyramidKV: the first layers keep most, the last ones least, tokens as SnapKV (arXiv 2406.02069)."""

from __future__ import annotations

from typing import ClassVar

from uncomp import budget
from uncomp.policies.base import Policy, register_policy


@register_policy
class PyramidKV(Policy):
    """Budgets fall linearly over the layers; their mean is the budget, to the token.

    With b' = b - W - n_s (W window, n_s sinks), m = b' / beta and M = 2 b' - m, layer l of L keeps

        W + n_s + M - l (M - m) / (L - 1)

    tokens a row. A prompt shorter than 2 b' gets b in every layer, as in the paper's code. Fractions go to the largest
    remainders, so the sum is L b exactly, where that code rounds each step down and loses tokens.

    policy_options: beta, at least 1 (default 20): the last layer keeps b' / beta beside window and sinks.
    """

    name = "pyramidkv"
    defaults: ClassVar = {"layer_shape": "pyramid", "window": 8}
    options: ClassVar = {"beta": 20}

    def __init__(self, config, shape) -> None:
        super().__init__(config, shape)
        self.beta = self.option["beta"]
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not self.beta >= 1:
            raise ValueError(f"uncomp: beta of pyramidkv must be at least 1; got {self.beta!r}")

    def totals(self, layer: int, lengths: list[int]) -> list[int]:
        """[B] tokens that the rows of a layer share."""
        config, shaped = self.config, super().totals(layer, lengths)
        means = [budget.mean_tokens(config.budget, n, config.floor) for n in lengths]
        return [
            self.shape.rows * b if n < 2 * (b - config.floor) else total
            for b, n, total in zip(means, lengths, shaped, strict=True)
        ]
