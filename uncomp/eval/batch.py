# SPDX-License-Identifier: Apache-2.0
"""One batch of prompts through a patched model: new tokens, what the cache stored for each prompt, how long it took."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from uncomp.eval.kept import KeptShare, kept_shares
from uncomp.eval.prompts import Prompt
from uncomp.hf.cache import UncompCache
from uncomp.patching import PatchHandle
from uncomp.report import ledger_of


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
    """Reads the cache when the first token of a batch is there."""

    cache: UncompCache
    prompts: Sequence[Prompt]
    started: float = 0.0
    first: float = 0.0  # seconds until the first token
    lost: float = 0.0  # seconds spent reading
    stored: list[Tensor] = field(default_factory=list)  # [B, rows] a layer
    kept: list[KeptShare] | None = None

    def __call__(self, tokens: Tensor) -> None:
        if self.stored:
            return
        now = time.perf_counter()
        self.first = now - self.started
        layers = [layer.ragged for layer in self.cache.uncomp.layers]
        self.stored = _stored(self.cache)
        if not self.cache.uncomp.config.keeps_all:
            longest = max(len(prompt.ids) for prompt in self.prompts)
            self.kept = kept_shares(layers, [prompt.evidence for prompt in self.prompts], longest)
        self.lost = time.perf_counter() - now


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
        prompts: the batch; for `agnostic` each with ids on both sides of its boundary.
        max_new_tokens: the most for each.
        agnostic: compress what lies before the boundary, feed the rest behind it, of which nothing is dropped.
        pad: id that fills the left side. eos: ids that end a text.
    Returns:
        an Outcome for each prompt.
    """
    cache, device = handle.new_cache(), model.device
    meter = _Meter(cache, prompts)
    context, mask = None, None
    pieces = [prompt.ids for prompt in prompts]
    meter.started = time.perf_counter()
    if agnostic:
        pieces = [prompt.ids[prompt.boundary :] for prompt in prompts]
        ids, mask = _padded([prompt.ids[: prompt.boundary] for prompt in prompts], pad, device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        options = {"position_ids": positions, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        model(input_ids=ids, attention_mask=mask, **options)
        context = _mean(_stored(cache))
    ids, new = _padded(pieces, pad, device)
    out = handle.generate(
        ids,
        new if mask is None else torch.cat([mask, new], 1),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos),
        pad_token_id=pad,
        past_key_values=cache,
        on_tokens=meter,
    )
    seconds = time.perf_counter() - meter.started
    new_tokens = out[:, ids.shape[1] :].tolist()
    ends = [next((i + 1 for i, t in enumerate(row) if t in eos), len(row)) for row in new_tokens]
    ledger = ledger_of(cache)
    finals = _stored(cache)
    sizes = ledger.slot_bytes
    slots = [[layer.ragged.slots[i] for layer in cache.uncomp.layers] for i in range(len(prompts))]
    batch, made = len(prompts), []
    begin = _mean(meter.stored)
    for i, (prompt, n) in enumerate(zip(prompts, ends, strict=True)):
        # Rows of a prompt that ended early went on growing with the others; they hold at most its own tokens.
        final = [torch.minimum(b[i], a[i] + n - 1) for a, b in zip(meter.stored, finals, strict=True)]
        final = [torch.where(a[i] > 0, f, a[i]) for a, f in zip(meter.stored, final, strict=True)]
        held = int(sum(int(f.sum()) for f in final))
        rows = sum(f.numel() for f in final)
        full = ledger.layers * ledger.num_kv_heads * (len(prompt.ids) + n - 1) * ledger.token_bytes
        other = ledger.other_bytes // batch
        made.append(
            Outcome(
                tokens=new_tokens[i][:n],
                per_row=[a[i].tolist() for a in meter.stored],
                context=None if context is None else context[i],
                end=held / rows if rows else begin[i],
                bytes={
                    "kv": sum(int(f.sum()) * size for f, size in zip(final, sizes, strict=True)) + other,
                    "votes": ledger.state_bytes * sum(slots[i]) // max(sum(map(sum, slots)), 1),
                    "allocated": sum(n * size for n, size in zip(slots[i], sizes, strict=True)) + other,
                    "full": full + other,
                },
                prefill_seconds=meter.first / batch,
                decode_seconds=max(0.0, seconds - meter.first - meter.lost) / batch,
                kept=meter.kept[i] if meter.kept is not None else None,
            )
        )
    return made


def _padded(pieces: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Left-padded ids [B, S] int64 and their mask."""
    longest = max(map(len, pieces))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in pieces])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in pieces])
    return ids.to(device), mask.to(device)


def _stored(cache: UncompCache) -> list[Tensor]:
    """[B, rows] a layer, as they are now: a step counts in place."""
    held = [layer.ragged.stored() for layer in cache.uncomp.layers]
    if len({(tuple(t.shape), t.device) for t in held}) == 1:
        return list(torch.stack(held).cpu().unbind())  # one wait for the device
    return [t.to("cpu", copy=True) for t in held]


def _mean(stored: Sequence[Tensor]) -> list[float]:
    """[B] mean over rows and layers of [B, rows] a layer."""
    return torch.cat([s.float() for s in stored], 1).mean(1).tolist()
