# SPDX-License-Identifier: Apache-2.0
"""What a model benchmark times: a model, ways to make its tokens, and caches of many sequences."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import uncomp
from uncomp.hf.choice import Choice
from uncomp.hf.loop import Loop
from uncomp.hf.reader import Reader

BUDGET, GROUPS = 1552, 8  # 4.74 % of 32768 tokens


def llama_3_8b(layers: int = 32, device: str = "cuda") -> torch.nn.Module:
    """The shape of Llama-3-8B with random bfloat16 weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072 + 8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
    )
    return _made(LlamaForCausalLM, config, device)


def qwen_2_5_half_b(layers: int = 24, device: str | torch.device = "cuda") -> torch.nn.Module:
    """The shape of Qwen2.5-0.5B with random bfloat16 weights, made on the device."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    return _made(Qwen2ForCausalLM, config, device)


def _made(kind: type, config: Any, device: str | torch.device) -> torch.nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = kind(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model


@dataclass(frozen=True)
class Engine:
    """A way to make tokens.

    Attributes:
        name: what the row says. config: of uncomp, or None for the stock model. loop: handle.generate's loop instead of
            stock generate. static: transformers' static cache with torch.compile.
    """

    name: str
    config: dict[str, Any] | None = None
    loop: bool = False
    static: bool = False


STOCK = Engine("stock DynamicCache")
STATIC = Engine("static cache, torch.compile", static=True)


def ours(*, budget: int = BUDGET, groups: int = GROUPS, loop: bool = False, compiled: bool = False) -> Engine:
    """Our engine with a compressed cache."""
    name = f"uncomp {'loop' if loop else 'generate'}{', compiled' if compiled else ''}"
    config = {"budget": budget, "groups": groups, "compile": "step" if compiled else "off"}
    return Engine(name, config, loop)


def full(*, loop: bool = True, compiled: bool = True) -> Engine:
    """Our engine with the full cache: what compression alone brings is measured against it."""
    name = f"uncomp {'loop' if loop else 'generate'}{', compiled' if compiled else ''}, full cache"
    return Engine(name, {"policy": "full", "compile": "step" if compiled else "off"}, loop)


@contextmanager
def running(model: torch.nn.Module, engine: Engine) -> Iterator[Any]:
    """The model as an engine runs it: its handle, or None for the stock model."""
    if engine.config is None:
        yield None
        return
    with uncomp.patch(model, uncomp.UncompConfig(**engine.config)) as handle:
        yield handle


def prefilled(model: torch.nn.Module, ids: Tensor, batch: int) -> tuple[Any, Tensor]:
    """The cache of one prompt, repeated for `batch` sequences, and their first token.

    Args:
        ids: [1, S] int64.
    Returns:
        (cache, [batch, 1] int64).
    """
    from transformers import DynamicCache

    with torch.no_grad():
        out = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1, use_cache=True)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    del out
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    return cache, token.repeat(batch, 1)


def step_ms(model, engine: Engine, handle, cache, ids: Tensor, token: Tensor, steps: int) -> tuple[float, float]:
    """Milliseconds of a decode step, everything of its engine included: (median over three runs, spread).

    The warm-up, a compilation or a recording, is not counted.

    Args:
        cache: holds ids. ids: [1, S]. token: [B, 1], the next one.
    """
    run = _runner(model, engine, handle, cache, ids, token)
    run(3)
    times = []
    for _ in range(3):
        synchronize(model.device)
        begin = time.perf_counter()
        run(steps)
        synchronize(model.device)
        times.append(1e3 * (time.perf_counter() - begin) / steps)
    return statistics.median(times), max(times) - min(times)


def _runner(model, engine: Engine, handle, cache, ids: Tensor, token: Tensor) -> Callable[[int], None]:
    if engine.loop:
        loop = Loop(model, handle._step, handle._forwards.enter)
        ended = torch.zeros_like(token, dtype=torch.bool)

        def run(steps: int) -> None:
            positions = torch.full_like(token, cache.get_seq_length())
            with torch.no_grad():
                loop._steps(cache, token, ended, positions, Choice(), steps, Reader((), None), ahead=True)

        return run
    seen = torch.cat([ids.expand(token.shape[0], -1), token], 1)

    def run(steps: int) -> None:
        nonlocal seen
        options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
        seen = model.generate(seen, attention_mask=torch.ones_like(seen), past_key_values=cache, **options)

    return run


def static_step_ms(model, ids: Tensor, batch: int, steps: int) -> tuple[float, float]:
    """As step_ms, for transformers' static cache with its compiled step: calls of two lengths, one less the other."""
    prompt = ids.repeat(batch, 1)

    def run(count: int) -> float:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        synchronize(model.device)
        begin = time.perf_counter()
        # The longer call's room, so that both run the same compiled step.
        model.generate(prompt, cache_implementation="static", max_cache_len=ids.shape[1] + 4 + steps, **options)
        synchronize(model.device)
        return time.perf_counter() - begin

    run(4)
    times = [1e3 * (run(4 + steps) - run(4)) / steps for _ in range(3)]
    return statistics.median(times), max(times) - min(times)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean(device: torch.device) -> None:
    """Gives memory back that nobody uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory that torch had allocated since `clean`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def cache_bytes(cache: Any) -> tuple[int, float]:
    """(bytes of keys and values, mean tokens a row of a layer stores)."""
    if getattr(cache, "uncomp", None) is not None:
        stats = uncomp.cache_stats(cache)
        return stats["cache_bytes"] + stats["other_bytes"], stats["stored_tokens_mean"]
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors), float(cache.get_seq_length())
