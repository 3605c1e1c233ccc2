# SPDX-License-Identifier: Apache-2.0
"""One batch of prompts through a patched model: new tokens, what the cache stored for each prompt, how long it took."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from uncomp.eval.kept import KeptShare, look, shares
from uncomp.eval.prompts import Prompt
from uncomp.hf.cache import UncompCache
from uncomp.patching import PatchHandle
from uncomp.report import ledger_of, read_together


@dataclass
class Outcome:
    """What one prompt of a batch gave.

    Fields:
        tokens: ids of the new tokens, an end-of-text token included.
        per_row: [layers][rows] tokens that compressed layers store when the first new token is chosen.
        context: mean of that when the context was compressed, before the question; None where they are one.
        end: mean over the rows when the prompt's own last token is chosen.
        bytes: kv (stored keys and values at the end), votes (state beside them), allocated (with free slots),
            full (a native cache of as many tokens); layers left uncompressed are in kv, allocated and full.
        prefill_seconds, decode_seconds: this prompt's share of the batch's.
        kept: which tokens of the answer are gone and how alike the rows keep; None where nothing is dropped.
    """

    tokens: list[int]
    per_row: list[list[int]]
    context: float | None
    end: float
    bytes: dict[str, int]
    prefill_seconds: float
    decode_seconds: float
    kept: KeptShare | None = None


@dataclass
class _Meter:
    """Looks at the cache when the first token of a batch is there; what it finds is read behind the last one, so that
    no decode step waits for it."""

    cache: UncompCache
    prompts: Sequence[Prompt]
    started: float = 0.0
    first: float = 0.0  # seconds until the first token
    blocks: list[Tensor] = field(default_factory=list)  # new tokens, [B, n] each
    stored: Tensor | None = None
    kept: Tensor | None = None
    _host: float = 0.0
    _span: tuple[Any, Any] | None = None

    def __call__(self, tokens: Tensor) -> None:
        self.blocks.append(tokens)
        if self.stored is not None:
            return
        now = time.perf_counter()
        self.first = now - self.started
        begin = _mark(self.cache)
        self.stored = _stored(self.cache)
        if not self.cache.uncomp.config.keeps_all:
            layers = [layer.ragged for layer in self.cache.uncomp.layers]
            longest = max(len(prompt.ids) for prompt in self.prompts)
            self.kept = look(layers, [prompt.evidence for prompt in self.prompts], longest)
        self._span = begin and (begin, _mark(self.cache))
        self._host = time.perf_counter() - now

    def lost(self) -> float:
        """Seconds spent looking, on the host or on the device, where it is longer; behind a wait for the device."""
        return max(self._host, self._span[0].elapsed_time(self._span[1]) / 1000 if self._span else 0.0)


def _mark(cache: UncompCache) -> Any:
    """An event on the stream of the cache's first layer; None on a CPU."""
    device = cache.uncomp.layers[0].ragged.row_len.device
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


@torch.no_grad()
def run(
    model: torch.nn.Module,
    handle: PatchHandle,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    agnostic: bool,
    pad: int,
    eos: Collection[int],
) -> list[Outcome]:
    """Generates greedily for a batch of prompts of any lengths.

    Args:
        model: a patched model, and its handle; for `agnostic` the config says extend="append".
        prompts: the batch; for `agnostic` each with ids on both sides of its boundary, and where layers are left
            uncompressed as many behind it: padding between context and question would push a window's tokens out.
        max_new_tokens: the most for each.
        agnostic: compress what lies before the boundary, feed the rest behind it, of which nothing is dropped.
        pad: id that fills the left side. eos: ids that end a text.
    Returns:
        an Outcome for each prompt.
    Raises:
        ValueError: questions of different lengths behind layers that are left uncompressed.
    """
    cache, device = handle.new_cache(), model.device
    meter = _Meter(cache, prompts)
    context, mask = None, None
    pieces = [prompt.ids for prompt in prompts]
    meter.started = time.perf_counter()
    if agnostic:
        pieces = [prompt.ids[prompt.boundary :] for prompt in prompts]
        if len(set(map(len, pieces))) > 1 and len(cache.layers) > len(cache.uncomp.layers):
            raise ValueError(
                "uncomp.eval: prompts must have as many ids behind the boundary, because layers are left uncompressed; "
                f"got {', '.join(str(len(piece)) for piece in pieces)}"
            )
        ids, mask = _padded([prompt.ids[: prompt.boundary] for prompt in prompts], pad, device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        options = {"position_ids": positions, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        model(input_ids=ids, attention_mask=mask, **options)
        context = _stored(cache)
    ids, new = _padded(pieces, pad, device)
    handle.generate(
        ids,
        new if mask is None else torch.cat([mask, new], 1),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos),
        pad_token_id=pad,
        past_key_values=cache,
        on_tokens=meter,
    )
    seconds = time.perf_counter() - meter.started
    return _outcomes(cache, prompts, meter, context, seconds, eos)


def _outcomes(
    cache: UncompCache,
    prompts: Sequence[Prompt],
    meter: _Meter,
    context: Tensor | None,
    seconds: float,
    eos: Collection[int],
) -> list[Outcome]:
    """What a batch gave, with one read of the device.

    Args:
        context: stored tokens as `_stored` has them, when the context was compressed alone.
        seconds: until the last text had ended.
    """
    batch = len(prompts)
    given = {"first": meter.stored, "final": _stored(cache), "context": context, "kept": meter.kept}
    given = {name: t for name, t in given.items() if t is not None}
    read = dict(zip(given, read_together(list(given.values())), strict=True))
    new_tokens = torch.cat(meter.blocks, 1).tolist()
    ends = [next((i + 1 for i, t in enumerate(row) if t in eos), len(row)) for row in new_tokens]
    first, final = read["first"].long(), read["final"].long()
    # Rows of a prompt that ended early went on growing with the others; they hold at most its own tokens.
    final = torch.where(first > 0, torch.minimum(final, first + torch.tensor(ends)[:, None] - 1), first)
    rows, held, begin = first.shape[1], final.sum(1).tolist(), first.double().mean(1).tolist()
    before = [None] * batch if context is None else read["context"].mean(1).tolist()
    kept = shares(read["kept"].tolist()) if "kept" in read else [None] * batch
    widths = [layer.ragged.stored().shape[1] for layer in cache.uncomp.layers]
    edges = [0, *accumulate(widths)]
    ledger = ledger_of(cache)
    sizes = ledger.slot_bytes
    stored = (final * torch.tensor(sizes).repeat_interleave(torch.tensor(widths))).sum(1).tolist()  # bytes
    slots = [[layer.ragged.slots[i] for layer in cache.uncomp.layers] for i in range(batch)]
    every = max(sum(map(sum, slots)), 1)
    other, lost = ledger.other_bytes // batch, meter.lost()
    windows = _windows(cache)
    made = []
    for i, (prompt, n, line) in enumerate(zip(prompts, ends, first.tolist(), strict=True)):
        real = len(prompt.ids) + n - 1
        beside = sum(size * min(real, columns) for columns, size in windows)
        full = ledger.layers * ledger.num_kv_heads * real * ledger.token_bytes
        made.append(
            Outcome(
                tokens=new_tokens[i][:n],
                per_row=[line[a:b] for a, b in pairwise(edges)],
                context=before[i],
                end=held[i] / rows if rows else begin[i],
                bytes={
                    "kv": stored[i] + beside,
                    "votes": ledger.state_bytes * sum(slots[i]) // every,
                    "allocated": sum(n * size for n, size in zip(slots[i], sizes, strict=True)) + other,
                    "full": full + beside,
                },
                prefill_seconds=meter.first / batch,
                decode_seconds=max(0.0, seconds - meter.first - lost) / batch,
                kept=kept[i],
            )
        )
    return made


def _windows(cache: UncompCache) -> list[tuple[int, int]]:
    """Columns that each layer left uncompressed holds of a sequence, and bytes of one; some may be padding."""
    ours = {id(layer) for layer in cache.uncomp.layers}
    states = [(layer.keys, layer.values) for layer in cache.layers if id(layer) not in ours]
    return [
        (keys.shape[2], sum(t.shape[1] * t.shape[3] * t.element_size() for t in (keys, values)))
        for keys, values in states
    ]


def _padded(pieces: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Left-padded ids [B, S] int64 and their mask."""
    longest = max(map(len, pieces))
    ids = torch.full((len(pieces), longest), pad)
    mask = torch.zeros_like(ids)
    for row, real, piece in zip(ids, mask, pieces, strict=True):
        row[longest - len(piece) :] = torch.tensor(piece)
        real[longest - len(piece) :] = 1
    return ids.to(device), mask.to(device)


def _stored(cache: UncompCache) -> Tensor:
    """[B, rows of all layers] int32 on the first layer's device, as they are now: a step counts in place."""
    held = [layer.ragged.stored() for layer in cache.uncomp.layers]
    return torch.cat([t.to(held[0].device) for t in held], 1)
