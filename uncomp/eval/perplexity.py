# SPDX-License-Identifier: Apache-2.0
"""Perplexity under a compressed prefix: a text's beginning is compressed, its continuation is scored.

A finer probe of damage than generated text: every token counts, and nothing hangs on one early slip.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.patching import patch
from uncomp.report import ledger_of, read_together

MODES = ("stepwise", "chunk")


@dataclass(frozen=True)
class ContinuationScore:
    """What one continuation after one prefix gave.

    Fields:
        loss: mean negative log-likelihood of the scored tokens, nats; its exponential is the perplexity.
        log_probs: [C - 1, V] float32 on the model's device, of every token that could have come at each scored place.
        stored_tokens_mean: over the rows of compressed layers after the prefix; its length for the full cache.
        prefill_seconds, decode_seconds: in the model, for the prefix and for the continuation.
        bytes: after the prefix: kv (stored keys and values), votes (state beside them), allocated (with free slots),
            full (a native cache of as many tokens); none for the stock cache.
    """

    loss: float
    log_probs: Tensor
    stored_tokens_mean: float
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    bytes: dict[str, int] = field(default_factory=dict)

    def against(self, full: ContinuationScore) -> tuple[float, float]:
        """`divergence` and `agreement`, with one read of the device."""
        kl, equal = torch.stack([self._divergence(full), self._agreement(full)]).tolist()
        return kl, equal

    def agreement(self, full: ContinuationScore) -> float:
        """Share of places where the most likely token is that of the full cache."""
        return float(self._agreement(full))

    def divergence(self, full: ContinuationScore) -> float:
        """Mean KL(full || this) over the places, nats."""
        return float(self._divergence(full))

    def _agreement(self, full: ContinuationScore) -> Tensor:
        return (self.log_probs.argmax(-1) == full.log_probs.argmax(-1)).float().mean()

    def _divergence(self, full: ContinuationScore) -> Tensor:
        return (full.log_probs.exp() * (full.log_probs - self.log_probs)).sum(-1).mean()


def windows(ids: Tensor, prefix: int, continuation: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Cuts `count` evenly spread pieces of a text into prefix and continuation.

    Args:
        ids: [N] int64 token ids.
        prefix, continuation: tokens of each, A and C.
        count: m pieces; piece i starts at floor(i (N - A - C) / (m - 1)), a single one at 0.
    Returns:
        m pairs of [1, A] and [1, C] int64.
    Raises:
        ValueError: a number below 1, a continuation below 2, or a text of fewer than A + C tokens.
    """
    if min(prefix, count) < 1 or continuation < 2:
        raise ValueError(
            f"uncomp.eval: prefix and count must be at least 1, continuation 2; got {prefix}, {count}, {continuation}"
        )
    spare = ids.numel() - prefix - continuation
    if spare < 0:
        raise ValueError(f"uncomp.eval: ids must be at least {prefix + continuation} tokens; got {ids.numel()}")
    starts = [i * spare // (count - 1) if count > 1 else 0 for i in range(count)]
    pieces = [ids[start : start + prefix + continuation].view(1, -1) for start in starts]
    return [(piece[:, :prefix], piece[:, prefix:]) for piece in pieces]


class Probe:
    """Scores continuations under one configuration. The model is patched once, so that a step that was recorded after
    one prefix is replayed after the next; a context manager.

    Args:
        model: a causal language model that is not patched; it is not patched afterwards either.
        config: how to compress; None for the stock cache.
        mode: "stepwise" feeds one token at a time under the decode rule of the config; "chunk" all at once behind the
            compressed prefix, of which nothing more is dropped: faster, and shows what the prefix lost alone.
    Raises:
        ValueError: another mode. NotImplementedError, ValueError: as `uncomp.patch`.
    """

    def __init__(self, model: torch.nn.Module, config: UncompConfig | None, *, mode: str = "stepwise") -> None:
        if mode not in MODES:
            raise ValueError(f"uncomp.eval: mode must be one of {', '.join(MODES)}; got {mode!r}")
        if config is not None and mode == "chunk" and config.policy != "full":
            config = replace(config, decode="grow", extend="append")
        self._model, self._mode = model, mode
        self._handle = None if config is None else patch(model, config)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exc) -> None:
        if self._handle is not None:
            self._handle.remove()

    def steps(self) -> dict[str, Any]:
        """As `PatchHandle.steps`; nothing for the stock cache."""
        return {} if self._handle is None else self._handle.steps()

    @torch.no_grad()
    def score(self, prefix: Tensor, continuation: Tensor) -> ContinuationScore:
        """Compresses the prefix and scores the continuation after it.

        Tokens 1 .. C - 1 are fed and 2 .. C scored: the first is predicted by the uncompressed prefill.

        Args:
            prefix: [1, A] int64. continuation: [1, C] int64, C at least 2.
        Raises:
            ValueError: another shape.
        """
        for name, ids, least in (("prefix", prefix, 1), ("continuation", continuation, 2)):
            if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < least:
                raise ValueError(f"uncomp.eval: {name} must be [1, {least} or more] token ids; got {list(ids.shape)}")
        model = self._model
        fed = continuation[:, :-1].to(model.device)
        begin = self._clock()
        cache = model(prefix.to(model.device), use_cache=True, logits_to_keep=1).past_key_values
        middle = self._clock()
        held = None if self._handle is None else _Held(cache)
        pieces = fed.split(1 if self._mode == "stepwise" else fed.shape[1], dim=1)
        again = self._clock()
        logits = [model(piece, past_key_values=cache, use_cache=True).logits[0] for piece in pieces]
        end = self._clock()
        log_probs = torch.cat(logits).float().log_softmax(-1)
        loss = -log_probs.gather(1, continuation[0, 1:, None].to(model.device)).mean()
        read = read_together([loss, *([] if held is None else [held.rows])])
        stored, size = (float(prefix.shape[1]), {}) if held is None else held.told(read[1])
        return ContinuationScore(float(read[0]), log_probs, stored, middle - begin, end - again, size)

    def _clock(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter()


class _Held:
    """What a cache stores when this is made; read later, so that nothing waits for it."""

    def __init__(self, cache: Any) -> None:
        self._ledger = ledger_of(cache)
        lengths, self._real = self._ledger.row_len, sum(self._ledger.clock.real())
        self.rows = torch.cat([n.to(lengths[0].device) for n in lengths])  # a copy: a step counts in place

    def told(self, rows: Tensor) -> tuple[float, dict[str, int]]:
        """Mean tokens of a row, and bytes as `ContinuationScore` has them, from `rows` on the host."""
        ledger, tokens = self._ledger, int(rows.sum())
        sizes = [size for size, n in zip(ledger.slot_bytes, ledger.row_len, strict=True) for _ in range(n.numel())]
        stored = int((rows.long() * torch.tensor(sizes)).sum())
        return tokens / (rows.numel() + ledger.deleted), {
            "kv": stored + ledger.other_bytes,
            "votes": ledger.state_bytes,
            "allocated": ledger.kv_bytes + ledger.other_bytes,
            "full": ledger.layers * self._real * ledger.num_kv_heads * ledger.token_bytes + ledger.other_bytes,
        }


def score(
    model: torch.nn.Module, prefix: Tensor, continuation: Tensor, config: UncompConfig | None, *, mode: str = "stepwise"
) -> ContinuationScore:
    """One continuation after one prefix; see `Probe`, which is faster for several."""
    with Probe(model, config, mode=mode) as probe:
        return probe.score(prefix, continuation)
