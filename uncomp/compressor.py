# SPDX-License-Identifier: Apache-2.0
"""The conductor of a prefill: entropy, grouping, budget, scoring, selection, compaction, in this order.

Takes: a PromptView of each layer. Gives: RaggedLayers. The host knows every total before a score exists, so nothing
waits for the device, but for two reads: a plan over the whole model reads the slots of each layer, once, and a decode
rule that compares one number a token (policies streaming_llm, tova and h2o) the longest room of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uncomp import keys, ops
from uncomp.cache import RaggedLayer, VoteState
from uncomp.config import UncompConfig
from uncomp.deletion import KeptRows, choose
from uncomp.rows import RowView
from uncomp.types import CacheShape, Plan, PlanRequest
from uncomp.view import LayerView, PromptView


@dataclass
class Measured:
    """A layer that has been scored and waits for its plan."""

    view: LayerView
    scores: Tensor  # [R, columns]
    statistic: Tensor | None  # [B, rows]; all rows, deleted ones too
    kept: KeptRows | None = None  # where rows are deleted: those that the view shows


class Compressor:
    """Turns the dense states of prompts into ragged layers, by one policy.

    Args:
        config: the configuration. shape: sizes of the model. policy: a Policy made for both.
    """

    def __init__(self, config: UncompConfig, shape: CacheShape, policy) -> None:
        self.config, self.policy = config, policy
        self.model_shape = self.shape = shape  # of the model, and of what is stored
        if policy.delete_heads:
            rows = shape.rows - policy.delete_heads
            heads = rows * (shape.num_q_heads // shape.rows)
            self.shape = replace(shape, rows=rows, num_kv_heads=rows, num_q_heads=heads)

    @property
    def whole_model(self) -> bool:
        """True if a plan needs all layers, so that they stay dense until the last one."""
        return self.policy.scope == "model" and not self.config.keeps_all

    def measure(self, view: PromptView) -> Measured:
        """Scores of a layer's tokens, and the statistic that orders its rows."""
        kept = None
        statistic = None if self.config.keeps_all and not self.policy.delete_heads else self.policy.statistic(view)
        if self.policy.delete_heads:
            kept = self.kept_rows(view, statistic)
            view = view.narrowed(kept, self.shape)
        if self.config.keeps_all:
            return Measured(
                view, torch.zeros(view.num_rows, view.columns, dtype=torch.float32, device=view.device), statistic, kept
            )
        return Measured(view, self.scored(view), statistic, kept)

    def kept_rows(self, view: PromptView, statistic: Tensor | None) -> KeptRows:
        """The rows of a prompt that store tokens, where the policy deletes some."""
        deleted = self.policy.deleted_rows(view.layer, statistic, view.batch, view.device)
        return choose(deleted, view.key, view.first, self.policy.delete_heads)

    def scored(self, view: LayerView) -> Tensor:
        """The policy's scores, if they are what its contract says."""
        scores, wanted = self.policy.score(view), (view.num_rows, view.columns)
        if not isinstance(scores, Tensor) or scores.shape != wanted or scores.dtype != torch.float32:
            got = f"{list(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"uncomp: scores of policy {self.policy.name} must be {list(wanted)} float32; got {got}")
        return scores

    def compress(self, measured: list[Measured]) -> list[RaggedLayer]:
        """Plans the given layers together and packs them.

        Args:
            measured: one layer, or with a plan over the whole model all of them.
        """
        plan = self.plan(measured)
        return [
            self.pack(m, limit, slots, stored)
            for m, limit, slots, stored in zip(measured, plan.limits, plan.slots, plan.stored, strict=True)
        ]

    def plan(self, measured: list[Measured]) -> Plan:
        """Limits of every row, and how many slots each sequence has in each layer."""
        rows, lengths = self.shape.rows, measured[0].view.seen
        if self.config.keeps_all:
            slots = [n * rows for n in lengths]
            limits = [
                torch.tensor(lengths, dtype=torch.int32, device=m.view.device).unsqueeze(1).repeat(1, rows)
                for m in measured
            ]
            return Plan(limits, [slots for _ in measured], [slots for _ in measured])
        if self.config.extend == "append" and isinstance(measured[0].view, RowView):
            return self._raised(measured)
        from_layers = [self.policy.totals(m.view.layer, m.view.seen) for m in measured]
        totals = [sum(layer[b] for layer in from_layers) for b in range(len(lengths))]
        device = measured[0].view.device
        statistic = None
        if measured[0].statistic is not None and not self.policy.delete_heads:  # else it has chosen the rows
            statistic = torch.cat([m.statistic.to(device) for m in measured], 1)
        request = PlanRequest(
            layers=[m.view.layer for m in measured],
            lengths=lengths,
            totals=totals,
            statistic=statistic,
            scores=[m.scores for m in measured],
            candidates=[m.view.length for m in measured],
            device=device,
        )
        whole = self.policy.limits(request)
        wanted = (len(lengths), rows * len(measured))
        if not isinstance(whole, Tensor) or whole.shape != wanted or whole.dtype != torch.int32:
            got = f"{list(whole.shape)} {whole.dtype}" if isinstance(whole, Tensor) else type(whole).__name__
            raise ValueError(f"uncomp: limits of policy {self.policy.name} must be {list(wanted)} int32; got {got}")
        limits = [part.to(m.view.device).contiguous() for part, m in zip(whole.split(rows, 1), measured, strict=True)]
        if any(m.view.seen != lengths for m in measured):
            return self._uneven(measured, limits, totals)
        slots = [totals]
        if len(measured) > 1:  # the one read of a plan over the whole model
            slots = whole.view(len(lengths), len(measured), rows).sum(2).t().tolist()
            self._check_totals(slots, totals)
        # A plan that is smaller than the prompts gives no row more than its prompt; a larger one stores them whole.
        over = [n * rows * len(measured) > total for n, total in zip(lengths, totals, strict=True)]
        stored = [[s if cut else n * rows for s, n, cut in zip(layer, lengths, over, strict=True)] for layer in slots]
        return Plan(limits, slots, stored)

    def _check_totals(self, slots: list[list[int]], totals: list[int]) -> None:
        if [sum(column) for column in zip(*slots, strict=True)] != totals:
            raise ValueError(f"uncomp: limits of policy {self.policy.name} must sum to {totals}; got {slots}")

    def _uneven(self, measured: list[Measured], limits: list[Tensor], totals: list[int]) -> Plan:
        """A plan over layers that different numbers of tokens have reached: a row stores what it has, up to its limit,
        and decoding fills the rest."""
        device = limits[0].device
        sums = [
            torch.stack([limit, torch.minimum(limit, m.view.length.view_as(limit))]).sum(2).to(device)
            for limit, m in zip(limits, measured, strict=True)
        ]
        slots, stored = torch.stack(sums, 1).tolist()
        self._check_totals(slots, totals)
        return Plan(limits, slots, stored)

    def _raised(self, measured: list[Measured]) -> Plan:
        """The plan of the rows as they are, with room for every new token."""
        rows, new = self.shape.rows, measured[0].view.lengths
        limits = [m.view.before.limit + new.on(m.view.device)[1].unsqueeze(1) for m in measured]
        slots = [[s + n * rows for s, n in zip(m.view.before.slots, new.length, strict=True)] for m in measured]
        return Plan(limits, slots, slots)

    def pack(self, measured: Measured, limit: Tensor, slots: list[int], stored: list[int]) -> RaggedLayer:
        """Selects the tokens of one layer and packs them into a new arena.

        Args:
            limit: [B, rows] int32. slots, stored: [B] host sums of the limits and of the tokens that stay.
        """
        view, config = measured.view, self.config
        room = limit.flatten()
        prompt = isinstance(view, PromptView)
        if not prompt:  # what was evicted is gone: a row may have fewer candidates than its limit
            stored = slots
        whole = prompt and view.original is None and measured.kept is None
        whole = whole and all(s == n * self.shape.rows for s, n in zip(stored, view.seen, strict=True))
        index, index_start = ops.select_tokens(
            measured.scores,
            view.length,
            room,
            min(sum(stored), view.num_rows * view.columns),
            sink=config.sinks,
            window=config.window,
            pool=config.pool_width,
            pool_mode=config.pool,
        )
        if config.grows:
            room = (torch.minimum(room, view.length) if prompt else room) + config.max_new_tokens
            slots = [s + config.max_new_tokens * self.shape.rows for s in stored]
        row_start = torch.cat([room.new_zeros(1), room.cumsum(0, dtype=torch.int32)])
        key_rows, value_rows, slot_position, row_len = view.compact(index, index_start, row_start, sum(slots))
        layer = RaggedLayer(
            key_rows,
            value_rows,
            slot_position,
            row_start,
            row_len,
            limit,
            view.batch,
            self.shape.rows,
            list(slots),
            self.policy.decode_rule(),
            measured.statistic,
            free=config.max_new_tokens if config.grows else None,
            kept=measured.kept.row if measured.kept else None,
            source=measured.kept.source if measured.kept else None,
            recent=min(view.seen, default=0) if whole else min(config.window, min(view.seen, default=0)),
            codec=view.coded[0],
            offset=view.coded[1],
        )
        if (keys.road(layer) or "").startswith("torch"):
            layer.measure()
        if not config.grows:
            self._seed(layer, measured, index, index_start)
        return layer

    def _seed(self, layer: RaggedLayer, measured: Measured, index: Tensor, index_start: Tensor) -> None:
        view, config = measured.view, self.config
        if layer.rule.kind == "vote":
            query, lse, position = view.last_queries(config.vote_window)
            layer.state = VoteState.empty(config.vote_window, layer.capacity, layer.num_rows, view.device)
            ops.seed_votes_(
                query,
                lse,
                position,
                view.packed_keys(layer, index, index_start),
                layer.slot_position,
                layer.row_start,
                layer.row_len,
                layer.state.votes,
                layer.state.vote_sum,
                layer.state.vote_step,
                layer.state.order,
                view.scale,
                reduce_group=config.reduce_scores,
            )
            if isinstance(view, RowView):
                view.carry_votes(layer, index, index_start)
            return
        # The other rules compare one number a token; rows have equal rooms here, up to the rounding of the plan.
        columns = int((layer.row_start[1:] - layer.row_start[:-1]).max()) if layer.num_rows else 0
        column = torch.arange(columns, device=view.device)
        entry = (index_start[:-1].unsqueeze(1) + column).clamp(max=max(index.numel() - 1, 0)).long()
        token = index[entry].long().clamp(0, view.columns - 1) if index.numel() else entry
        mass = self.policy.seed_mass(view, measured.scores).gather(1, token)
        layer.mass = torch.where(column < layer.row_len.unsqueeze(1), mass, 0.0)
