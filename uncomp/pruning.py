# SPDX-License-Identifier: Apache-2.0
"""Takes the attention of a layer's last queries.

Gives the tokens of each sequence that go on to the next stage of layers, and what they carry along, gathered.
Formula: u_j = sum over all query heads and the last queries of p[q,i,j]; newest tokens, sinks and largest u stay.
docs/method.md "Hidden-state pruning".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uncomp import ops
from uncomp.calibration import named
from uncomp.calibration.profile import HeadProfile, ModelFacts
from uncomp.config import UncompConfig
from uncomp.grouping import int32_on
from uncomp.prefill import PrefillPruning
from uncomp.stages import check_starts, default_threshold, find_threshold, rank_curve, stage_starts, stage_tokens
from uncomp.types import CacheShape, Lengths

PUBLISHED = {32: (0, 2, 15, 26, 31), 40: (0, 1, 3, 15, 23, 31, 35, 37)}  # layers: first layers of the stages
NEWEST = 8  # tokens that always stay, or the window where it is wider


@dataclass(frozen=True)
class Schedule:
    """The stages of one model.

    Fields:
        starts: first layer of every stage. num_layers: L.
        options: the tokens of every stage, and the queries that choose them.
        newest, sinks: last and first tokens that always stay.
    """

    starts: tuple[int, ...]
    num_layers: int
    options: PrefillPruning
    newest: int
    sinks: int

    def tokens(self, n: int) -> list[int]:
        """Tokens of a prompt of n that go through the layers of each stage."""
        options = self.options
        return stage_tokens(
            n,
            len(self.starts),
            n_max=options.n_max,
            n_min=options.n_min,
            n_step=options.n_step,
            floor=self.newest + self.sinks,
            prune_first=options.prune_first,
        )

    def by_layer(self, n: int) -> list[int]:
        """[L] tokens of a prompt of n that reach each layer."""
        tokens, stage, reached = self.tokens(n), 0, []
        for layer in range(self.num_layers):
            stage += layer in self.starts[1:]
            # The first layer has no layer before it whose attention could choose.
            reached.append(tokens[stage] if layer else n)
        return reached


def schedule_for(config: UncompConfig, shape: CacheShape) -> Schedule | None:
    """The stages that a configuration asks for, for one model; None where prompts are not pruned.

    Raises:
        ValueError: stages beyond the model's layers, or none to be had: no profile, no published stages.
        NotImplementedError: layers that are not full attention.
        OSError: a profile that cannot be read.
    Source: docs/method.md "Hidden-state pruning".
    """
    options, layers = config.prefill, shape.model_layers or shape.num_layers
    if options is None:
        return None
    if shape.num_layers != layers:
        raise NotImplementedError(
            f"uncomp: prefill pruning needs full attention in all {layers} layers, because other layers carry state "
            f"over the tokens that would be missing; {shape.model_type} has {shape.num_layers}"
        )
    newest = max(NEWEST, config.window)
    return Schedule(tuple(_starts(config, shape, layers)), layers, options, newest, config.sinks)


def _starts(config: UncompConfig, shape: CacheShape, layers: int) -> Sequence[int]:
    options = config.prefill
    if options.stages == "fixed":
        if layers not in PUBLISHED:
            known = " and ".join(map(str, PUBLISHED))
            raise ValueError(
                f'uncomp: prefill stages must be layers or "profile" for a model of {layers} layers; "fixed" is '
                f"published for {known}"
            )
        return PUBLISHED[layers]
    if options.stages != "profile":
        return check_starts(options.stages, layers)
    profile = _profile(config, shape, layers)
    curve = profile.curve if options.curve == "entropy" else rank_curve(profile.entropy, profile.model.D)
    if options.num_stages is not None:
        return stage_starts(curve, find_threshold(curve, options.num_stages))
    threshold = default_threshold(shape.num_q_heads) if options.threshold is None else options.threshold
    return stage_starts(curve, threshold)


def _profile(config: UncompConfig, shape: CacheShape, layers: int) -> HeadProfile:
    name = config.prefill.profile or (None if config.profile == "online" else config.profile)
    if name is None:
        name = named.shipped_for(shape.config_hash)
    if name is None:
        raise ValueError(
            "uncomp: prefill stages must be layers, or come from a profile (profile=FILE of uncomp calibrate), because "
            'a layer\'s entropy is not known before the prompt has passed it; got stages="profile" and no profile of '
            "this model comes with the package"
        )
    profile = named.load(name)
    ours = (layers, shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
    facts = ModelFacts(shape.model_type or profile.model.type, *ours, shape.config_hash or profile.model.hash)
    profile.check(facts, profile.run.k, profile.run.kind)
    return profile


class PrunedPrompt:
    """The tokens of one prompt on their way through the layers.

    The host knows how many tokens reach each layer before the first one runs, so nothing waits for the device.

    Args:
        schedule: the stages.
        lengths: real tokens of the prompt. pack: see hf/clock.py.
        device: where most layers lie; numbers are copied there once, before the first layer runs.

    Attributes:
        reached: [L][B] real tokens that reach each layer.
        lengths: those of the layer that runs.
        position: [B, N] int32 original positions, real tokens counted from 0, -1 at padding; None until tokens have
            been dropped.
        pack: as given, until tokens have been dropped: then the real ones are a suffix.
    """

    def __init__(self, schedule: Schedule, lengths: Lengths, pack: Tensor | None, device: torch.device) -> None:
        self.schedule, self.lengths, self.pack = schedule, lengths, pack
        by_sequence = [schedule.by_layer(n) for n in lengths.length]
        self.reached = [list(layer) for layer in zip(*by_sequence, strict=True)]
        self.borders: dict[int, Lengths] = {}  # layer before which tokens leave: those that stay
        for layer in range(1, schedule.num_layers):
            if self.reached[layer] != self.reached[layer - 1]:
                keep = self.reached[layer]
                self.borders[layer] = Lengths(keep, max(keep))
        Lengths.upload([lengths, *self.borders.values()], device)
        for each in self.borders.values():
            if len(set(each.length)) > 1:
                int32_on(device, tuple(each.length))  # budgets will ask for them
        self.position: Tensor | None = None
        self._place: Tensor | None = None  # [B, N] int32 position + 1, so that what the gather puts at padding is 0
        self._scores: tuple[int, Tensor] | None = None

    @property
    def first(self) -> int | None:
        """The first layer that fewer tokens reach; None where none are dropped."""
        return min(self.borders, default=None)

    def score(self, layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Takes the attention of a layer in, where the next one gets fewer tokens.

        Args:
            query: [B, Hq, N, D]. key: [B, Hkv, N, D]. Rotated; the real tokens are a suffix.
        """
        if layer + 1 in self.borders:
            self._scores = layer, token_scores(query, key, scale, self.schedule.options.hidden_queries, self.lengths)

    def enter(self, layer: int, tensors: list[Tensor]) -> list[Tensor]:
        """What enters a layer before which tokens leave.

        Args:
            tensors: [B or 1, N, ...] each, one device: hidden states and what goes with them, of the tokens that
                reached the layer before.
        Returns:
            [B, N', ...] each: of the tokens that stay, ascending, zeros at padding.
        Raises:
            RuntimeError: the attention of the layer before was not seen.
        """
        scored, self._scores = self._scores, None
        if scored is None or scored[0] != layer - 1:
            raise RuntimeError(f"uncomp: prefill pruning did not see the attention of layer {layer - 1}")
        device, keep = tensors[0].device, self.borders[layer]
        index = chosen_tokens(scored[1].to(device), self.lengths, keep, self.schedule.newest, self.schedule.sinks)
        if self.pack is not None:
            column = self.pack.to(device).gather(1, index.clamp(min=0).long())
            index = torch.where(index < 0, index, column.to(torch.int32))
        *moved, self._place = ops.gather_tokens([*tensors, self._places(device)], index)
        self.position = self._place - 1
        self.lengths, self.pack = keep, None
        return moved

    def _places(self, device: torch.device) -> Tensor:
        if self._place is not None:
            return self._place.to(device)
        column = torch.arange(1, self.lengths.seq_len + 1, dtype=torch.int32, device=device).unsqueeze(0)
        if self.pack is not None:  # real tokens lie between others: their rank is their place
            return self.pack.to(device).argsort(1).to(torch.int32) + 1 - self.lengths.on(device)[0].unsqueeze(1)
        return column - self.lengths.on(device)[0].unsqueeze(1) if self.lengths.padded else column


def token_scores(query: Tensor, key: Tensor, scale: float, queries: int, lengths: Lengths) -> Tensor:
    """Attention that the last queries of all heads give to each token.

    Args:
        query: [B, Hq, N, D]. key: [B, Hkv, N, D]. Rotated.
        scale: factor of the logits. queries: how many of the last. lengths: real tokens, a suffix.
    Returns:
        [B, N] float32, columns counted from the first real token, 0 behind the last.
    Source: docs/method.md "Hidden-state pruning".
    """
    first, length = lengths.on(query.device) if lengths.padded else (None, None)
    rows, _ = ops.window_scores(
        query[:, :, query.shape[2] - min(queries, query.shape[2]) :],
        key,
        scale,
        first=first,
        length=length,
        reduce_group="sum",
    )
    # In float64 no order of summation changes the result, so a sequence's tokens do not hang on its batch.
    return rows.view(query.shape[0], key.shape[1], -1).sum(1, dtype=torch.float64).float()


def chosen_tokens(scores: Tensor, lengths: Lengths, keep: Lengths, newest: int, sinks: int) -> Tensor:
    """Columns of the tokens that go on: the newest, the sinks, the best scores between; ties to the lower position.

    Args:
        scores: [B, N] float32, columns counted from the first real token; NaN is the smallest.
        lengths: real tokens among the N columns. keep: among the N' columns that go on.
        newest, sinks: last and first tokens of each sequence that stay.
    Returns:
        [B, N'] int32 columns, ascending, -1 at the padding in front.
    Source: docs/method.md "Hidden-state pruning".
    """
    device = scores.device
    first, length = lengths.on(device)
    begin, count = keep.on(device)
    index, start = ops.select_tokens(scores, length, count, sum(keep.length), sink=sinks, window=newest)
    if not keep.padded:
        index = index.view(len(keep.length), keep.seq_len)
        return index + first.unsqueeze(1) if lengths.padded else index
    column = torch.arange(keep.seq_len, dtype=torch.int32, device=device) - begin.unsqueeze(1)
    entry = (start[:-1].unsqueeze(1) + column.clamp(min=0)).clamp(max=index.numel() - 1).long()
    return torch.where(column < 0, -1, index[entry] + first.unsqueeze(1))
