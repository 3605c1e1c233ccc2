# SPDX-License-Identifier: Apache-2.0
"""One measured call of stock generate: what it stored, how long it took, and how it compares with the full cache."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.patching import patch
from uncomp.report import cache_stats

Progress = Callable[[str], None]
_WARMUP = 16  # prompt tokens of the call that is not measured


@dataclass(frozen=True)
class GenerationReport:
    """What one call of generate gave, and what it cost.

    Attributes:
        policy, budget: of the configuration; "full" and None for the stock cache.
        tokens: ids of the new tokens.
        stored_tokens_mean, stored_tokens_min, stored_tokens_max: over the rows of compressed layers, at the end.
        cache_bytes: keys and values of all layers, free slots and uncompressed layers included.
        state_bytes: positions, layout and votes beside them.
        full_cache_bytes: keys and values of a stock cache of as many tokens.
        prefill_seconds: from the call to the first new token.
        decode_tokens_per_second: over the decode steps without the first; None below two new tokens.
        peak_bytes: most memory in use during the call, weights included: allocated by torch on a GPU, resident in the
            process on a CPU; None where the system does not tell.
        entropy: [layers][rows] of the first sequence, what the heads were ordered by; None where nothing was measured.
        stored: [layers][rows] stored tokens of the first sequence.
    """

    policy: str
    budget: int | float | None
    prompt_tokens: int
    tokens: list[int]
    text: str
    stored_tokens_mean: float
    stored_tokens_min: int
    stored_tokens_max: int
    cache_bytes: int
    state_bytes: int
    full_cache_bytes: int
    prefill_seconds: float
    decode_tokens_per_second: float | None
    peak_bytes: int | None
    entropy: list[list[float]] | None = None
    stored: list[list[int]] | None = None

    @property
    def new_tokens(self) -> int:
        """Tokens that were generated, an end-of-text token included."""
        return len(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: all but the token ids and the tables by head."""
        names = (
            "policy budget prompt_tokens new_tokens text stored_tokens_mean stored_tokens_min stored_tokens_max "
            "cache_bytes state_bytes full_cache_bytes prefill_seconds decode_tokens_per_second peak_bytes"
        )
        return {name: getattr(self, name) for name in names.split()}


def encode(tokenizer: Any, text: str, *, chat: bool = False) -> Tensor:
    """Token ids of a prompt, [1, S] int64.

    Args:
        tokenizer: of the model.
        text: the prompt, or with `chat` what the user says in it.
        chat: wrap it in the tokenizer's chat template.
    Raises:
        ValueError: a tokenizer without a chat template, or a text that has no tokens.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("uncomp: the model has no chat template; leave out --chat (chat=True)")
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat, verbose=False).input_ids
    if ids.shape[1] == 0:
        raise ValueError("uncomp: the prompt has no tokens")
    return ids.long()


def agreement(one: GenerationReport, other: GenerationReport) -> float:
    """Share of equal tokens at equal positions, of the longer of the two."""
    longest = max(one.new_tokens, other.new_tokens)
    return sum(a == b for a, b in zip(one.tokens, other.tokens, strict=False)) / longest if longest else 1.0


def run(
    model: torch.nn.Module,
    tokenizer: Any,
    prompt_ids: Tensor,
    config: UncompConfig | None,
    max_new_tokens: int,
    progress: Progress | None = None,
    *,
    min_new_tokens: int = 0,
) -> GenerationReport:
    """Generates greedily with stock `generate` and measures it. A short call before it, not measured, warms up.

    Args:
        model: a model that is not patched; it is not patched afterwards either.
        tokenizer: turns the new tokens into text.
        prompt_ids: [1, S] int64, on any device.
        config: how to compress; None for the stock cache of the unpatched model.
        max_new_tokens: the most to generate; an end-of-text token ends earlier.
        progress: called with one line after the prefill and after every new token.
        min_new_tokens: no end of text before these.
    Returns:
        a GenerationReport.
    Raises:
        NotImplementedError, ValueError: as `uncomp.patch`, and for a prompt that is not [1, S] with S > 0 or that
            leaves no room for the new tokens among the model's positions.
    """
    _check(model, prompt_ids, max_new_tokens)
    handle = patch(model, config) if config is not None else None
    try:
        ids = prompt_ids.to(model.device)
        _generate(model, ids[:, :_WARMUP], 2, 2, _Clock(model.device, None))
        clock = _Clock(model.device, progress)
        peak = _Peak(model.device)
        clock.begin()
        out = _generate(model, ids, max_new_tokens, min_new_tokens, clock)
        peak_bytes = peak.read()
    finally:
        if handle is not None:
            handle.remove()
    cache, new = out.past_key_values, out.sequences[0, ids.shape[1] :].tolist()
    return GenerationReport(
        policy=config.policy if config else "full",
        budget=config.budget if config else None,
        prompt_tokens=ids.shape[1],
        tokens=new,
        text=tokenizer.decode(new, skip_special_tokens=True),
        prefill_seconds=clock.prefill,
        decode_tokens_per_second=clock.rate,
        peak_bytes=peak_bytes,
        **(_compressed(cache) if config else _full(cache)),
    )


def _check(model: torch.nn.Module, prompt_ids: Tensor, max_new_tokens: int) -> None:
    if prompt_ids.dim() != 2 or prompt_ids.shape[0] != 1 or prompt_ids.shape[1] == 0:
        raise ValueError(f"uncomp: the prompt must be [1, S] token ids with S > 0; got {tuple(prompt_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"uncomp: max_new_tokens must be at least 1; got {max_new_tokens}")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and prompt_ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"uncomp: prompt of {prompt_ids.shape[1]} tokens and {max_new_tokens} new ones must fit the model's "
            f"{limit} positions; shorten the prompt or lower the new tokens"
        )


def _generate(model, ids: Tensor, most: int, least: int, clock: _Clock):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=most,
        min_new_tokens=least or None,
        return_dict_in_generate=True,
        stopping_criteria=[clock],
    )


def _compressed(cache) -> dict[str, Any]:
    stats = cache_stats(cache)
    ragged = [layer.ragged for layer in cache.uncomp.layers]
    measured = all(r.statistic is not None for r in ragged)
    return {
        **{name: stats[name] for name in ("stored_tokens_mean", "stored_tokens_min", "stored_tokens_max")},
        "cache_bytes": stats["cache_bytes"] + stats["other_bytes"],
        "state_bytes": stats["state_bytes"],
        "full_cache_bytes": stats["full_cache_bytes"] + stats["other_bytes"],
        "entropy": [r.statistic[0].tolist() for r in ragged] if measured else None,
        "stored": [r.stored()[0].tolist() for r in ragged],
    }


def _full(cache) -> dict[str, Any]:
    tokens = cache.get_seq_length()
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return {
        "stored_tokens_mean": float(tokens),
        "stored_tokens_min": tokens,
        "stored_tokens_max": tokens,
        "cache_bytes": size,
        "state_bytes": 0,
        "full_cache_bytes": size,
    }


class _Clock:
    """A stopping criterion that stops nothing: generate calls it after every new token."""

    def __init__(self, device: torch.device, progress: Progress | None) -> None:
        self.device, self.progress = device, progress
        self.times: list[float] = []
        self.start = 0.0

    def begin(self) -> None:
        self._wait()
        self.start = time.perf_counter()

    def __call__(self, ids: Tensor, scores: Any, **kwargs) -> Tensor:
        self._wait()
        self.times.append(time.perf_counter())
        if self.progress is not None:
            count = len(self.times)
            self.progress(f"prefill {self.prefill:.1f} s" if count == 1 else f"{count} tokens")
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    @property
    def prefill(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.start

    @property
    def rate(self) -> float | None:
        """Decode steps a second; the first one is left out where there are more."""
        times = self.times[1:] if len(self.times) > 2 else self.times
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Peak:
    """Most memory in use since construction."""

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device = device
        self.known = True
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:  # Linux: give freed memory back, then lower the high-water mark to what is resident now
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            self.known = False

    def read(self) -> int | None:
        """Bytes, or None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if not self.known or not sys.platform.startswith("linux"):
            return None
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
