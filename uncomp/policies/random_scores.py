# SPDX-License-Identifier: Apache-2.0
"""Random: tokens by lot; the floor that any scorer must beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from uncomp.policies.base import Policy, register_policy
from uncomp.scoring import uniform_numbers
from uncomp.view import LayerView


@register_policy
class Random(Policy):
    """s_j = a uniform number of (config.seed, layer, row, position): repeatable, the same in any batch.

    Decoding evicts by votes, as the default policy does.
    """

    name = "random"
    blind = True
    defaults: ClassVar = {"pool_width": 1}

    def score(self, view: LayerView) -> Tensor:
        """[R, columns] float32 in [0, 1)."""
        row = torch.arange(self.shape.rows, device=view.device).repeat(view.batch).unsqueeze(1)
        return uniform_numbers(self.config.seed, view.layer, row, view.position)
