# SPDX-License-Identifier: Apache-2.0
"""patch(model, config): stock `generate`, pipelines and plain calls use the compressed cache until it is removed.

Touches: the model's attention implementation, and forward hooks on the module that owns the decoder layers. Nothing
outside that model changes, and no forward is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from uncomp.config import UncompConfig
from uncomp.graph import CudaGraphs, Recordings
from uncomp.hf import attention
from uncomp.hf.cache import UncompCache
from uncomp.hf.choice import choice_for
from uncomp.hf.chunks import ChunkedMlps
from uncomp.hf.forward import Forwards, NotCopied
from uncomp.hf.hidden import HiddenPruning, asked_model
from uncomp.hf.joined import JoinedProjections
from uncomp.hf.loop import Loop, check_prompt
from uncomp.hf.step import Step
from uncomp.models import describe, family_of
from uncomp.models.base import ModelFacts
from uncomp.policies import make_policy
from uncomp.pruning import schedule_for
from uncomp.report import stats_of

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8)  # integers: quantised weights
_MARK = "_uncomp_handle"


def patch(model: torch.nn.Module, config: UncompConfig | None = None) -> PatchHandle:
    """Makes a HuggingFace causal language model use a compressed KV cache.

    Args:
        model: a model of a supported family (docs/policies.md); its weights keep their values.
        config: how to compress; default UncompConfig().
    Returns:
        a handle: `.remove()` undoes everything, `.stats()` tells what is stored; also a context manager.
    Raises:
        NotImplementedError: the model, or a layer of it, cannot be compressed, with the reason.
        ValueError: the config does not fit the model, or the model is patched already.
    """
    config = UncompConfig() if config is None else config
    facts = check(model, config)
    stack = family_of(model.config).text_stack(model)
    if getattr(stack, _MARK, None) is not None:
        raise ValueError("uncomp.patch: the model is patched already; call .remove() on its handle first")
    if config.prefill is not None:
        asked_model(model, stack)
    return PatchHandle(model, stack, config, facts)


def check(model: torch.nn.Module, config: UncompConfig) -> ModelFacts:
    """What of the arguments of `patch` does not fit is said; nothing is changed.

    Returns:
        the model's sizes, and which layers are compressed.
    Raises:
        as `patch`, but for a model that is patched already.
    """
    if not isinstance(config, UncompConfig):
        raise TypeError(f"uncomp.patch: config must be an UncompConfig; got {type(config).__name__}")
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"uncomp.patch: model must be a model of transformers; got {type(model).__name__}")
    facts = describe(model.config, config)
    make_policy(config, facts.shape)
    schedule_for(config, facts.shape)
    dtype = next(model.parameters()).dtype
    if dtype not in _DTYPES:
        raise NotImplementedError(f"uncomp.patch: weights must be float32, float16 or bfloat16; got {dtype}")
    return facts


def generate(
    model: torch.nn.Module, input_ids: Tensor, *args: Any, config: UncompConfig | None = None, **kwargs: Any
) -> Tensor:
    """Generates with a compressed cache, the loop on the device; arguments as `PatchHandle.generate`.

    A model that is patched already keeps its patch, and its recorded steps; another one is patched for this call.

    Args:
        config: how to compress, for a model that is not patched; default UncompConfig().
    Raises:
        ValueError: a config for a model that is patched already; and as `patch` and `PatchHandle.generate`.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"uncomp.generate: model must be a model of transformers; got {type(model).__name__}")
    handle = getattr(family_of(model.config).text_stack(model), _MARK, None)
    if handle is None:
        with patch(model, config) as handle:
            return handle.generate(input_ids, *args, **kwargs)
    if config is not None:
        raise ValueError("uncomp.generate: the model is patched already; leave out config, or remove the patch")
    return handle.generate(input_ids, *args, **kwargs)


class PatchHandle(NotCopied):
    """What `patch` did, and how to undo it.

    Attributes:
        config: the configuration in force.
        facts: the model's sizes, and which layers are compressed.
    """

    def __init__(self, model, stack, config: UncompConfig, facts) -> None:
        self.config, self.facts = config, facts
        self._model, self._stack = model, stack
        self._before = model.config._attn_implementation
        model.set_attn_implementation(attention.NAME)
        text = model.config.get_text_config(decoder=True)
        if text._attn_implementation != attention.NAME:
            model.set_attn_implementation(self._before)
            raise NotImplementedError(
                f"uncomp.patch: {type(model).__name__} does not take a registered attention implementation"
            )
        self._recordings = Recordings(CudaGraphs())
        self._hidden = None if config.prefill is None else HiddenPruning(model, stack)
        self._forwards = Forwards(model, stack, config, facts, self._recordings, self._hidden)
        family, compiled = family_of(model.config), config.compile == "step"
        owners = [part for layer in stack.layers for part in (family.attention(layer), family.mlp(layer))]
        self._joined = JoinedProjections(owners if compiled else ())
        self._step = Step(
            stack,
            self._recordings,
            self._why_not(),
            self._forwards.active,
            asked=config.graph == "off",
            compiled=compiled,
            joined=self._joined,
        )
        self._mlps = ChunkedMlps(family.mlp(layer) for layer in stack.layers)
        setattr(stack, _MARK, self)

    # ---- what a user calls
    def remove(self) -> None:
        """Gives back the very same model; a second call does nothing."""
        if self._forwards.removed:
            return
        self._forwards.remove()
        self._step.remove()
        self._mlps.remove()
        if self._hidden is not None:
            self._hidden.remove()
        self._recordings.clear()
        self._joined.remove()  # behind the recordings, which keep weights: nothing is to be there twice
        self._model.set_attn_implementation(self._before)
        delattr(self._stack, _MARK)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()

    @property
    def cache(self) -> Cache | None:
        """The cache of the last forward, while somebody holds it."""
        return self._forwards.cache

    def new_cache(self) -> UncompCache:
        """An empty cache for this model and config, to be passed as past_key_values."""
        return UncompCache(self._model, self.config)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        past_key_values: UncompCache | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Generates with sampling and stop tests on the device; the host reads tokens in blocks.

        Gives the tokens of stock `generate` where it is greedy, with fewer options. The model's generation_config is
        read for end and padding tokens alone. Up to 31 steps are made behind the end before the host has read of it,
        and count in stats(); with a cache of the caller's none is: there every step waits for the one before.

        Args:
            input_ids: [B, S] int64, on the model's device; padded on the left. Behind a cache only what is new.
            attention_mask: [B, S], 1 at real tokens; None if all are. Behind a cache [B, columns it has seen + S].
            max_new_tokens: the most to generate, at least 1.
            do_sample: draw tokens, from torch's default generator; else the most likely ones.
            temperature, top_k, top_p: of the distribution that is drawn from; applied in this order.
            eos_token_id: tokens that end a sequence; default: the model's. An empty sequence for none.
            pad_token_id: what ended sequences are filled with; default: the model's, else its first end token, else 0.
            past_key_values: a cache of `new_cache`, which the prompt continues; default: a new one. The last token that
                is returned is not in it.
            on_tokens: called with each block of new tokens, [B, n] int64 on the CPU.
        Returns:
            [B, S + n] int64, n <= max_new_tokens: fewer where all sequences ended.
        Raises:
            ValueError: an argument out of its range, by name.
            TypeError: the model does not generate.
        """
        if self._forwards.removed:
            raise RuntimeError("uncomp.generate: the patch was removed; patch the model again")
        if not hasattr(self._model, "generation_config"):
            raise TypeError(f"uncomp.generate: wants a model that generates; {type(self._model).__name__} has no head")
        choice = choice_for(
            self._model,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
        cache = past_key_values
        if cache is None:
            cache = DynamicCache(config=self._model.config)  # as stock generate makes it: a compiled step serves both
        elif not isinstance(cache, UncompCache):
            raise ValueError(
                f"uncomp.generate: past_key_values must come from handle.new_cache(); got {type(cache).__name__}"
            )
        check_prompt(input_ids, attention_mask, max_new_tokens, cache.get_seq_length())
        out = Loop(self._model, self._step, self._forwards.enter).run(
            input_ids, attention_mask, cache, choice, max_new_tokens, on_tokens, ahead=past_key_values is None
        )
        self._forwards.ledger(cache)
        return out

    def stats(self) -> dict[str, Any]:
        """What the last forward's cache stores, or stored before it was dropped; see `uncomp.cache_stats`.

        Reads row lengths back from the device.

        Raises:
            RuntimeError: no forward has run yet.
        """
        ledger = self._forwards.ledger()
        if ledger is None:
            raise RuntimeError("uncomp: stats() needs a forward of the patched model first")
        recordings = self._recordings
        return stats_of(ledger) | {
            **self.steps(),
            "graph_bytes": recordings.machine.scratch_bytes(),
            "waiting_bytes": recordings.waiting_bytes(),
        }

    def steps(self) -> dict[str, Any]:
        """Decode steps that were recorded, replayed and neither, and why the last of these was; reads no device."""
        recordings = self._recordings
        return {
            "steps_recorded": recordings.recorded,
            "steps_replayed": recordings.replayed,
            "steps_eager": recordings.eager,
            "eager_reason": recordings.reason,
        }

    def release(self) -> None:
        """Frees recorded steps and the memory that they keep between requests; the next request records anew."""
        self._recordings.clear()
        self._step.forget_failures()

    def _why_not(self) -> str | None:
        if self.config.graph == "off":
            return 'the configuration says graph="off"'
        if len(self.facts.managed) != self._stack.config.num_hidden_layers:
            return "some layers of the model are not compressed"
        return None
