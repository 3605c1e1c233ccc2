# SPDX-License-Identifier: Apache-2.0
"""Runs policies on bare tensors, through the compressor and the cache; and what float64 references share."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from uncomp import UncompConfig, eviction, extension
from uncomp.compressor import Compressor
from uncomp.policies import make_policy
from uncomp.types import CacheShape, Lengths
from uncomp.view import PromptView

DIM = 16
SCALE = DIM**-0.5


def shape_of(config: UncompConfig, layers: int = 3, q_heads: int = 6, kv_heads: int = 3) -> CacheShape:
    return CacheShape(layers, q_heads, kv_heads, DIM, q_heads if config.rows == "query_head" else kv_heads)


class Story:
    """Queries, keys and values of one sequence in all layers, [L, H, tokens, D]; the same for the same number."""

    def __init__(self, number: int, shape: CacheShape, tokens: int = 260):
        made = torch.Generator().manual_seed(1000 + number)

        def states(heads: int) -> torch.Tensor:
            return torch.randn(shape.num_layers, heads, tokens, DIM, generator=made)

        stretch = torch.rand(shape.num_layers, shape.num_q_heads, 1, DIM, generator=made) ** 2 + 0.05
        self.query, self.key = 2.5 * states(shape.num_q_heads) * stretch, states(shape.num_kv_heads)
        self.value = states(shape.num_kv_heads)


class Run:
    """A batch of stories in a compressed cache: prompt, decode steps, later turns. Padding holds NaN."""

    def __init__(self, config, shape, lengths, stories=None, change=None):
        self.config, self.shape = config, shape
        self.stories = [Story(i, shape) for i in range(len(lengths))] if stories is None else stories
        self.compressor = Compressor(config, shape, make_policy(config, shape))
        if change is not None:
            change(self.compressor.policy)
        self.seen = list(lengths)
        views = [
            PromptView(
                layer,
                shape,
                config,
                *self.columns(layer, [0] * len(lengths), lengths),
                Lengths(lengths, max(lengths)),
                SCALE,
            )
            for layer in range(shape.num_layers)
        ]
        self.layers = self.pack([self.compressor.measure(view) for view in views])

    def pack(self, measured):
        if self.compressor.whole_model:
            for m in measured:
                m.view.release(self.config.vote_window)
            return self.compressor.compress(measured)
        return [self.compressor.compress([m])[0] for m in measured]

    def columns(self, layer, begin, count):
        """Left-padded [B, H, T, D] of query, key and value."""
        width, result = max(count), []
        for name in ("query", "key", "value"):
            parts = [getattr(s, name)[layer, :, b : b + n] for s, b, n in zip(self.stories, begin, count, strict=True)]
            whole = torch.full((len(parts), parts[0].shape[0], width, DIM), float("nan"))
            for row, part in zip(whole, parts, strict=True):
                row[:, width - part.shape[1] :] = part
            result.append(whole)
        return result

    def step(self) -> list[torch.Tensor]:
        """One decode step in every layer; [B, Hq, 1, D] each."""
        position = torch.tensor(self.seen, dtype=torch.int32)
        one = [1] * len(self.seen)
        out = []
        for i, layer in enumerate(self.layers):
            layer.ensure_free(1)
            layer.count(1)
            states = self.columns(i, self.seen, one)
            out.append(eviction.decode_step(layer, self.config, *states, position, SCALE))
        self.seen = [n + 1 for n in self.seen]
        return out

    def turn(self, count: list[int]) -> list[torch.Tensor]:
        """Several new tokens at once."""
        chunk = SimpleNamespace(lengths=Lengths(count, max(count)), prior=list(self.seen), voided=False)
        results = []
        for i, layer in enumerate(self.layers):
            given = self.columns(i, self.seen, count)
            if chunk.lengths.padded:
                given = [t.nan_to_num(0.0) for t in given]
            results.append(extension.extend(layer, self.compressor, i, *given, chunk, SCALE))
        self.seen = [a + b for a, b in zip(self.seen, count, strict=True)]
        taken = [t for _, t in results]
        self.layers = taken if taken[0] in self.layers or hasattr(taken[0], "row_len") else self.pack(taken)
        return [out for out, _ in results]

    def kept(self, layer: int) -> list[list[int]]:
        """Positions in every row, in slot order."""
        held = self.layers[layer]
        start, length = held.row_start.tolist(), held.row_len.tolist()
        return [held.slot_position[s : s + n].tolist() for s, n in zip(start, length, strict=False)]

    def attended(self, layer: int, kept: list[list[int]], position: list[int]) -> torch.Tensor:
        """[B, Hq, 1, D] float64: the query at `position` over exactly the tokens of its row and itself."""
        out = []
        for b, story in enumerate(self.stories):
            for head in range(self.shape.num_q_heads):
                row = b * self.shape.rows + head * self.shape.rows // self.shape.num_q_heads
                kv = head * self.shape.num_kv_heads // self.shape.num_q_heads
                index = [*kept[row], position[b]]
                query = story.query[layer, head, position[b]].double()
                logits = story.key[layer, kv, index].double() @ query * SCALE
                out.append(logits.softmax(0) @ story.value[layer, kv, index].double())
        return torch.stack(out).view(len(self.stories), -1, 1, DIM)


# ---- float64, one sequence, one layer
def weights(story: Story, layer: int, n: int) -> torch.Tensor:
    """[Hq, n, n] float64, causal attention weights."""
    query, key = story.query[layer, :, :n].double(), story.key[layer, :, :n].double()
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    logits = query @ key.transpose(1, 2) * SCALE
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)


def by_row(heads: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, ...] mean over the query heads of a row."""
    return heads.view(rows, heads.shape[0] // rows, *heads.shape[1:]).mean(1)


def pooled(scores, width: int, mode: str = "max") -> list[float]:
    half, values = width // 2, [float(s) for s in scores]
    near = [values[max(j - half, 0) : j + half + 1] for j in range(len(values))]
    return [max(x) if mode == "max" else sum(x) / width for x in near]


def best(scores, count: int, low: int, high: int) -> list[int]:
    """The `count` largest of columns low .. high - 1, ties to the lower."""
    return sorted(sorted(range(low, high), key=lambda j: (-float(scores[j]), j))[:count])


def chosen(scores, n: int, limit: int, window: int, sinks: int = 0) -> list[int]:
    """Kept positions of a row: sinks, window, and the best between them."""
    if limit >= n:
        return list(range(n))
    return [*range(sinks), *best(scores, limit - window - sinks, sinks, n - window), *range(n - window, n)]
