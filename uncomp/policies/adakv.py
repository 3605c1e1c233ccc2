# SPDX-License-Identifier: Apache-2.0
"""AdaKV: the rows of a layer compete for its budget by their scores (arXiv 2407.11550)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from uncomp import budget, ops
from uncomp.grouping import int32_on
from uncomp.policies import compete
from uncomp.policies.base import Policy, register_policy
from uncomp.types import PlanRequest


@register_policy
class AdaKV(Policy):
    """Tokens as SnapKV; the limit of row h follows from its pooled scores s.

    With H rows, b' = b - W - n_s tokens a row beside window and sinks, and f_h = tokens of row h among the H b' largest
    scores of the layer (ties to the lower row, then the lower position):

        form "blend"    b_h = W + n_s + alpha b' + (1 - alpha) f_h
        form "protect"  each row's floor(alpha b') best are safe; the rest of H b' goes to the best that remain

    Fractions go to the largest remainders, ties to the lower row, so limits sum to H b exactly. A row is clipped to the
    tokens it has; what it leaves goes to the other rows in proportion. Computed in integers on the device.

    policy_options: alpha in [0, 1] with at most three decimals (default 0.2), form (default "blend").
    """

    name = "adakv"
    defaults: ClassVar = {"window": 32}
    options: ClassVar = {"alpha": 0.2, "form": "blend"}

    def __init__(self, config, shape) -> None:
        super().__init__(config, shape)
        alpha, form = self.option["alpha"], self.option["form"]
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise ValueError(f"uncomp: alpha of adakv must lie in [0, 1]; got {alpha!r}")
        self.alpha = budget.exact(alpha)
        if self.alpha.denominator > 1000:
            raise ValueError(f"uncomp: alpha of adakv must have at most three decimals; got {alpha!r}")
        if form not in ("blend", "protect"):
            raise ValueError(f"uncomp: form of adakv must be one of 'blend', 'protect'; got {form!r}")

    def limits(self, request: PlanRequest) -> Tensor:
        """[B, rows] int32; a sequence's row sums to its total exactly. No host sync."""
        rows, batch, floor = self.shape.rows, len(request.lengths), self.config.floor
        host = [total - rows * floor for total in request.totals]  # tokens beside windows and sinks
        have = (request.candidates[0].long().view(batch, rows) - floor).clamp(min=0)
        spare = int32_on(request.device, tuple(host)).long().unsqueeze(1)
        scores = compete.candidates(request.scores[0], request.candidates[0], self.config)
        safe, whole = self.alpha, self.alpha.denominator
        if self.option["form"] == "protect":
            least = [int(safe * each // rows) for each in host]
            scores = self._protected(scores, have, least)
        hits = compete.hits(scores.view(batch, -1), rows, torch.minimum(spare, have.sum(1, keepdim=True)), host)
        if self.option["form"] == "blend":
            hits = safe.numerator * spare + (whole - safe.numerator) * rows * hits  # times rows * whole
        return (floor + budget.clipped_shares(hits, have, spare)).to(torch.int32)

    def _protected(self, scores: Tensor, have: Tensor, least: list[int]) -> Tensor:
        """Scores with +inf at each row's best; least: [B] tokens a row."""
        rows, columns = self.shape.rows, scores.shape[1]
        wanted = int32_on(scores.device, tuple(least)).long().unsqueeze(1)
        keep = torch.minimum(wanted, have).flatten().to(torch.int32)
        total = sum(rows * min(each, columns) for each in least)
        index, start = ops.select_tokens(scores, torch.full_like(keep, columns), keep, total, sink=0, window=0)
        row = compete.owner(start, total, len(keep))
        best = torch.zeros_like(scores, dtype=torch.int32)
        best.view(-1).scatter_add_(0, row * columns + index.clamp(min=0), (index >= 0).to(torch.int32))
        return scores.masked_fill(best > 0, float("inf"))
