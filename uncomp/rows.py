# SPDX-License-Identifier: Apache-2.0
"""A layer in a later turn, as a policy sees it: stored tokens and new ones, in position order, row by row."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from uncomp import ops
from uncomp.cache import RaggedLayer
from uncomp.config import UncompConfig
from uncomp.keys import all_keys
from uncomp.scoring import head_scores
from uncomp.types import CacheShape, Lengths
from uncomp.view import CHUNK, LayerView, largest_head, padded_window, sums


class RowView(LayerView):
    """Rows of an arena in position order: stored tokens, and behind them the new ones of a turn.

    Args:
        query: [B, Hq, T, D], the new tokens' queries; the real ones are a suffix.
        arena: stored and new tokens, in position order.
        source: [C] int64, slot of `before` that a slot's token comes from, -1 for new tokens.
        before: the layer as it was, whose votes count on where the new queries are fewer than the window.
        lengths: new tokens. prior: [B] real tokens before them.
    """

    def __init__(
        self,
        layer: int,
        shape: CacheShape,
        config: UncompConfig,
        query: Tensor,
        arena: RaggedLayer,
        source: Tensor,
        before: RaggedLayer,
        lengths: Lengths,
        prior: list[int],
        scale: float,
    ) -> None:
        self.layer, self.shape, self.config, self.scale = layer, shape, config, scale
        self.query, self.arena, self.source, self.before = query, arena, source, before
        self.lengths, self.prior = lengths, prior
        self.seen = [a + b for a, b in zip(prior, lengths.length, strict=True)]
        self.batch, self.device = query.shape[0], query.device
        self.columns = int(arena.row_len.max()) if arena.num_rows else 0  # one read a layer and turn
        self._lse: Tensor | None = None

    @property
    def length(self) -> Tensor:
        """[R] int32."""
        return self.arena.row_len

    @cached_property
    def slot(self) -> Tensor:
        """[R, columns] int64, slot of the arena; clamped behind the last candidate."""
        column = torch.arange(self.columns, device=self.device)
        slot = self.arena.row_start[:-1].long().unsqueeze(1) + column
        return slot.clamp(max=max(self.arena.capacity - 1, 0))

    @property
    def position(self) -> Tensor:
        """[R, columns] int32."""
        return self.arena.slot_position[self.slot]

    @cached_property
    def key_rows(self) -> Tensor:
        """[C, D] keys of the arena; with a codec in memory of their own as long as this view."""
        return all_keys(self.arena)

    @property
    def keys(self) -> Tensor:
        """[R, columns, D]."""
        return self.key_rows[self.slot]

    @property
    def values(self) -> Tensor:
        """[R, columns, Dv]."""
        return self.arena.value_rows[self.slot]

    def window_scores(self, window: int, *, reduce: str = "mean", value_norm: bool = False) -> Tensor:
        """See LayerView; where the new queries are fewer than the window, stored votes stand for older ones."""
        total = torch.zeros(self.num_rows, self.columns, dtype=torch.float32, device=self.device)
        lse = self.query.new_full((*self.query.shape[:2], window), float("-inf"), dtype=torch.float32)
        for sequences, tokens in self._runs():
            have = min(window, tokens)
            if have:
                scores, part = self._scores(sequences, self.query.shape[2] - have, self.query.shape[2], 0, reduce)
                total[self._rows(sequences)] = scores
                lse[sequences, :, window - have :] = part
            if have < window and self.before.state is not None:
                older = self._votes()[: window - have, self.slot[self._rows(sequences)]].sum(0)
                bits = 30 - max(0, (self.config.vote_window - 1).bit_length())
                total[self._rows(sequences)] += older.float() / (1 << bits)
        if self._lse is None or self._lse.shape[2] < window:
            self._lse = lse
        total = total.masked_fill(~self.live, 0.0)
        return total * self.values.float().norm(dim=-1) if value_norm else total

    def _accumulate(self, reduce: str) -> Tensor:
        """See LayerView; what the rows had gathered before counts on."""
        per_head, total = sums(self, reduce)
        for sequences, tokens in self._runs():
            rows, width = (
                self._rows(sequences, self.shape.num_q_heads if per_head else self.shape.rows),
                self.query.shape[2],
            )
            for begin in range(width - tokens, width, CHUNK):
                end = min(begin + CHUNK, width)
                total[rows] += self._scores(sequences, begin, end, width - end, "none" if per_head else reduce)[0]
        return (largest_head(self, total) + self.past_mass()).masked_fill(~self.live, 0.0)

    def past_mass(self) -> Tensor:
        """[R, columns] float32, what a decode rule had gathered for each stored token; 0 for new ones."""
        if self.before.mass is None:
            return torch.zeros(self.num_rows, self.columns, dtype=torch.float32, device=self.device)
        old = self.source[self.slot]
        column = (old - self.before.row_start[:-1].long().unsqueeze(1)).clamp(0, self.before.mass.shape[1] - 1)
        return self.before.mass.gather(1, column).masked_fill((old < 0) | ~self.live, 0.0)

    def last_queries(self, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """As PromptView.last_queries; a query that is not new does not exist, its votes are carried over."""
        if self._lse is None or self._lse.shape[2] < window:
            self.window_scores(window)
        have = min(window, self.query.shape[2])
        lse = self._lse[:, :, self._lse.shape[2] - have :]
        query, lse = padded_window(self.query[:, :, self.query.shape[2] - have :], lse, window)
        tokens = self.lengths.on(self.device)[1].unsqueeze(1)
        index = tokens - torch.arange(window, 0, -1, dtype=torch.int32, device=self.device)
        prior = torch.tensor(self.prior, dtype=torch.int32, device=self.device).unsqueeze(1)
        return query, lse, torch.where(index >= 0, prior + index, -1)

    def compact(self, index: Tensor, index_start: Tensor, row_start: Tensor, capacity: int) -> tuple[Tensor, ...]:
        """Packs chosen candidates; arguments and results as ops.compact_kv."""
        arena = self.arena
        return ops.compact_kv(
            arena.key_rows,
            arena.value_rows,
            index,
            index_start,
            row_start,
            capacity,
            position=arena.slot_position,
            source_start=arena.row_start,
        )

    def packed_keys(self, layer: RaggedLayer, index: Tensor, index_start: Tensor) -> Tensor:
        """[C, D] keys of the arena that these tokens were packed into; arguments as `compact`."""
        return all_keys(layer)

    def release(self, window: int) -> None:
        """Drops keys that a codec made; all else that must wait for a plan over the whole model is small already."""
        self.__dict__.pop("key_rows", None)

    @property
    def coded(self) -> tuple:
        """See LayerView."""
        return self.arena.codec, self.arena.offset

    def carry_votes(self, layer: RaggedLayer, index: Tensor, index_start: Tensor) -> None:
        """Adds the votes of older queries, which a short turn leaves inside the vote window, to a packed layer."""
        state, window = layer.state, self.config.vote_window
        if self.before.state is None or min(self.lengths.length) >= window or not index.numel():
            return
        row = layer.slot_rows()
        column = torch.arange(layer.capacity, device=self.device) - layer.row_start[row]
        entry = (index_start[row] + column).clamp(max=index.numel() - 1).long()
        old = self.arena.row_start[row] + index[entry].clamp(min=0)
        votes = self._votes()[:, old.long()].masked_fill(column >= layer.row_len[row], 0)  # newest first
        new = self.lengths.on(self.device)[1][row // self.shape.rows]
        for ring in range(window):
            age = (window - 1 - ring - new).long()  # among the old votes
            carried = votes.gather(0, age.clamp(0, window - 1).unsqueeze(0)).squeeze(0).masked_fill(age < 0, 0)
            state.votes[ring] += carried
            state.vote_sum += carried

    def _votes(self) -> Tensor:
        """[Wd, C of the arena] int32, votes of the queries before this turn, newest first; 0 for new tokens."""
        if self._ordered is None:
            state, window = self.before.state, self.before.state.votes.shape[0]
            step = state.vote_step[self.before.slot_rows()].long()
            ring = (step - 1 - torch.arange(window, device=self.device).unsqueeze(1)) % window
            ordered = state.votes.gather(0, ring)
            self._ordered = ordered[:, self.source.clamp(min=0)].masked_fill(self.source < 0, 0)
        return self._ordered

    _ordered: Tensor | None = None

    def _runs(self) -> list[tuple[slice, int]]:
        """Neighbouring sequences with equally many new tokens."""
        runs, begin, lengths = [], 0, self.lengths.length
        for b in range(1, self.batch + 1):
            if b == self.batch or lengths[b] != lengths[begin]:
                runs.append((slice(begin, b), lengths[begin]))
                begin = b
        return runs

    def _rows(self, sequences: slice, rows: int | None = None) -> slice:
        rows = rows or self.shape.rows
        return slice(sequences.start * rows, sequences.stop * rows)

    def _scores(self, sequences: slice, begin: int, end: int, after: int, reduce: str) -> tuple[Tensor, Tensor]:
        """Attention mass of the queries in columns begin .. end - 1, `after` tokens before the newest."""
        rows, arena = self._rows(sequences), self.arena
        query, start = self.query[sequences, :, begin:end], arena.row_start[rows.start : rows.stop + 1]
        length = arena.row_len[rows] - after
        if reduce == "none":
            return head_scores(query, self.key_rows, self.scale, start, length, self.columns)
        return ops.window_scores(
            query,
            self.key_rows,
            self.scale,
            row_start=start,
            row_len=length,
            columns=self.columns,
            reduce_group="none" if self.shape.rows == self.shape.num_q_heads else reduce,
        )
