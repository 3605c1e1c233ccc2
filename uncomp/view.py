# SPDX-License-Identifier: Apache-2.0
"""What a policy may see of a layer that is about to be compressed: tokens of each cache row, and ways to score them.

A row is what one KV head (or, with rows="query_head", one query head) of one sequence stores; R = B * rows. Columns
are candidates in position order, column 0 the first real token of the row. Source: docs/method.md "Scoring".
"""

from __future__ import annotations

import abc
from functools import cached_property

import torch
from torch import Tensor

from uncomp import ops
from uncomp.config import UncompConfig
from uncomp.deletion import KeptRows, narrow
from uncomp.latent import Latents
from uncomp.types import CacheShape, Lengths

CHUNK = 64  # queries that window_scores takes at once


class LayerView(abc.ABC):
    """Candidates of one layer; `PromptView` and `RowView` differ in where K and V lie, not in what a policy may ask.

    Attributes:
        layer: index among the compressed layers.
        shape: sizes of the model.
        config: the checked configuration.
        batch: sequences B.
        num_rows: R = B * shape.rows.
        columns: width of the scores.
        scale: factor of the attention logits.
        device: where the layer's K and V lie.
    """

    layer: int
    shape: CacheShape
    config: UncompConfig
    batch: int
    columns: int
    scale: float
    device: torch.device

    seen: list[int]  # [B] real tokens of each sequence, those of earlier turns included
    coded: tuple = (None, None)  # codec and offset of a layer that is packed from this view, see RaggedLayer

    @property
    def num_rows(self) -> int:
        """R, rows of the batch."""
        return self.batch * self.shape.rows

    @property
    @abc.abstractmethod
    def length(self) -> Tensor:
        """[R] int32, candidates of every row."""

    @property
    @abc.abstractmethod
    def position(self) -> Tensor:
        """[R, columns] int32, original positions; arbitrary behind the last candidate."""

    @property
    @abc.abstractmethod
    def keys(self) -> Tensor:
        """[R, columns, D], rotated keys; arbitrary behind the last candidate. May cost a copy."""

    @property
    @abc.abstractmethod
    def values(self) -> Tensor:
        """[R, columns, Dv]; arbitrary behind the last candidate. May cost a copy."""

    @abc.abstractmethod
    def window_scores(self, window: int, *, reduce: str = "mean", value_norm: bool = False) -> Tensor:
        """[R, columns] float32: attention mass of the last `window` queries, reduced over the row's query heads."""

    def accumulated_scores(self, *, reduce: str = "mean") -> Tensor:
        """[R, columns] float32: attention mass of all queries so far, summed, then reduced over the row's query heads.

        Costs as many flops as attention itself; a second call returns the tensor of the first.
        """
        known = self.__dict__.setdefault("_accumulated", {})
        if reduce not in known:
            known[reduce] = self._accumulate(reduce)
        return known[reduce]

    @abc.abstractmethod
    def _accumulate(self, reduce: str) -> Tensor:
        """What accumulated_scores returns."""

    @property
    def live(self) -> Tensor:
        """[R, columns] bool, True where a candidate stands."""
        return torch.arange(self.columns, device=self.device) < self.length.unsqueeze(1)


class PromptView(LayerView):
    """A prompt's dense queries, keys and values.

    Args:
        query: [B, Hq, S, D] rotated. key, value: [B, Hkv, S, D], [B, Hkv, S, Dv].
        lengths: real tokens, behind left padding.
        original: [B, S] int32 original positions where earlier layers dropped tokens, -1 at padding; None: 0, 1, 2, ...
        latent: what is stored of the keys, where the model gives it; scores see the keys.
    """

    def __init__(
        self,
        layer: int,
        shape: CacheShape,
        config: UncompConfig,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Lengths,
        scale: float,
        original: Tensor | None = None,
        latent: Latents | None = None,
    ) -> None:
        self.layer, self.shape, self.config, self.scale = layer, shape, config, scale
        self.query, self.key, self.value, self.lengths, self.original = query, key, value, lengths, original
        self.latent = latent
        self.batch, self.columns, self.device = query.shape[0], query.shape[2], query.device
        self.seen = lengths.length
        self.first, self.tokens = lengths.on(query.device) if lengths.padded else (None, None)
        self._lse: Tensor | None = None  # [B, Hq, W] of the widest window scored so far

    @cached_property
    def length(self) -> Tensor:
        """[R] int32."""
        return self.lengths.on(self.device)[1].repeat_interleave(self.shape.rows)

    @cached_property
    def position(self) -> Tensor:
        """[R, S] int32: real tokens are counted from 0, those that earlier layers dropped included."""
        if self.original is not None:
            return self._from_first(self.original.unsqueeze(1)).squeeze(1).repeat_interleave(self.shape.rows, 0)
        return torch.arange(self.columns, dtype=torch.int32, device=self.device).expand(self.num_rows, -1)

    @cached_property
    def keys(self) -> Tensor:
        """[R, S, D]."""
        return self._rows(self.key)

    @cached_property
    def values(self) -> Tensor:
        """[R, S, Dv]."""
        return self._rows(self.value)

    def window_scores(self, window: int, *, reduce: str = "mean", value_norm: bool = False) -> Tensor:
        """See LayerView."""
        window = min(window, self.columns)
        scores, lse = ops.window_scores(
            self.query[:, :, self.query.shape[2] - window :],
            self.key,
            self.scale,
            value=self.value if value_norm else None,
            first=self.first,
            length=self.tokens,
            reduce_group=self._reduce(reduce),
        )
        if self._lse is None or self._lse.shape[2] < window:
            self._lse = lse
        return scores

    def narrowed(self, kept: KeptRows, shape: CacheShape) -> PromptView:
        """The kept rows alone, a KV head each, with the queries of the window; shape: sizes of what is stored."""
        last = self.query[:, :, self.columns - min(self.config.window, self.columns) :]
        states = (narrow(t, kept.row, self.shape.rows) for t in (last, self.key, self.value))
        made = PromptView(self.layer, shape, self.config, *states, self.lengths, self.scale, self.original)
        made.columns = self.columns
        return made

    def release(self, window: int) -> None:
        """Lets go of all but the last queries, when the layer must wait for a plan over the whole model."""
        self._lse = self.last_queries(min(window, self.columns))[1]
        self.query = self.query[:, :, self.columns - min(window, self.columns) :].clone()

    def _accumulate(self, reduce: str) -> Tensor:
        """See LayerView."""
        first, length = self.lengths.on(self.device)
        per_head, total = sums(self, reduce)
        for end in range(min(CHUNK, self.columns), self.columns + CHUNK, CHUNK):
            end = min(end, self.columns)
            begin = (end - 1) // CHUNK * CHUNK
            seen = (end - first).clamp(min=0)
            scores, _ = ops.window_scores(
                self.query[:, :, begin:end],
                self.key,
                self.scale,
                first=first,
                length=torch.minimum(seen, length),
                reduce_group="none" if per_head else reduce,
            )
            total += scores
        return largest_head(self, total)

    def last_queries(self, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """The last `window` queries with their log-sum-exp, as seed_votes_ takes them.

        Returns:
            query [B, Hq, window, D], lse [B, Hq, window] float32, position [B, window] int32; -1 where a prompt is
            shorter than the window.
        """
        have = min(window, self.columns)
        if self._lse is None or self._lse.shape[2] < have:
            self.window_scores(have)
        lse = self._lse
        last = self.query[:, :, self.query.shape[2] - have :]
        query, lse = padded_window(last, lse[:, :, lse.shape[2] - have :], window)
        if self.original is not None:
            newest = self.original[:, self.columns - have :]
            return query, lse, torch.nn.functional.pad(newest, (window - have, 0), value=-1)
        tokens = self.lengths.on(self.device)[1].unsqueeze(1)
        position = tokens - torch.arange(window, 0, -1, dtype=torch.int32, device=self.device)
        return query, lse, position.clamp(min=-1)

    def compact(self, index: Tensor, index_start: Tensor, row_start: Tensor, capacity: int) -> tuple[Tensor, ...]:
        """Packs chosen candidates; arguments and results as ops.compact_kv."""
        stored = (self.key, self.value) if self.latent is None else (self.latent.rows, self.latent.values)
        return ops.compact_kv(
            *stored, index, index_start, row_start, capacity, position=self.original, first=self.first
        )

    def packed_keys(self, layer, index: Tensor, index_start: Tensor) -> Tensor:
        """[C, D] keys of the arena that these tokens were packed into; arguments as `compact`."""
        if self.latent is None:
            return layer.key_rows
        place = (index, index_start, layer.row_start, layer.capacity)
        return ops.compact_kv(self.key, self.value, *place, position=self.original, first=self.first)[0]

    @property
    def coded(self) -> tuple:
        """See LayerView."""
        return (None, None) if self.latent is None else (self.latent.codec, self.latent.offset)

    def _reduce(self, reduce: str) -> str:
        return "none" if self.shape.rows == self.shape.num_q_heads else reduce

    def _from_first(self, dense: Tensor) -> Tensor:
        """[B, H, S, ...] with columns counted from the first real token."""
        if not self.lengths.padded:
            return dense
        first = self.lengths.on(self.device)[0].long().view(-1, 1)
        column = (torch.arange(self.columns, device=self.device) + first).clamp(max=self.columns - 1)
        column = column.view(self.batch, 1, -1, *[1] * (dense.dim() - 3))
        return dense.gather(2, column.expand(-1, dense.shape[1], -1, *dense.shape[3:]))

    def _rows(self, dense: Tensor) -> Tensor:
        dense = self._from_first(dense)
        repeat = self.shape.rows // dense.shape[1]
        return dense.repeat_interleave(repeat, 1).flatten(0, 1) if repeat > 1 else dense.flatten(0, 1)


def sums(view: LayerView, reduce: str) -> tuple[bool, Tensor]:
    """Where queries are summed up: True and [B * Hq, columns] zeros, or, where heads may be reduced first, False and
    [R, columns] zeros. The largest of sums is not the sum of the largest, so "max" keeps heads apart."""
    heads = view.shape.num_q_heads
    per_head = reduce == "max" or view.shape.rows == heads
    return per_head, torch.zeros(
        view.batch * heads if per_head else view.num_rows, view.columns, dtype=torch.float32, device=view.device
    )


def largest_head(view: LayerView, total: Tensor) -> Tensor:
    """[R, columns] from what `sums` began."""
    group = total.shape[0] // max(view.num_rows, 1)
    return total.view(view.num_rows, group, view.columns).amax(1) if group > 1 else total


def padded_window(query: Tensor, lse: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Fills a window with queries that do not exist, in front."""
    missing = window - query.shape[2]
    if missing > 0:
        query = torch.cat([query.new_zeros(*query.shape[:2], missing, query.shape[3]), query], 2)
        lse = torch.cat([lse.new_full((*lse.shape[:2], missing), float("-inf")), lse], 2)
    return query, lse.contiguous()
