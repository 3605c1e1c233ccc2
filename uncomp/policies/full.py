# SPDX-License-Identifier: Apache-2.0
"""Full: nothing is dropped; the baseline of every comparison, through the same cache."""

from __future__ import annotations

from uncomp.policies.base import Policy, register_policy


@register_policy
class Full(Policy):
    """Every row stores every token, and decoding appends: attention equals that of the unpatched model.

    The budget is not read. What the cache does is decided by `UncompConfig.keeps_all`.
    """

    name = "full"

    def totals(self, layer: int, lengths: list[int]) -> list[int]:
        """Every token of every row."""
        return [self.shape.rows * n for n in lengths]
