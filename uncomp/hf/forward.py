# SPDX-License-Identifier: Apache-2.0
"""What happens around a forward of a patched model: its cache is made or taken over, its tokens are counted."""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from uncomp.config import UncompConfig
from uncomp.graph import Recordings
from uncomp.hf.cache import UncompCache, new_layers
from uncomp.hf.hidden import HiddenPruning
from uncomp.hf.shared import SharedState
from uncomp.latent import MARK, run_exactly
from uncomp.report import Ledger, ledger_of


class NotCopied:
    """Part of a patched model, which is neither copied nor saved whole."""

    def __reduce_ex__(self, protocol):
        """Refused: a copy of the model would run the original's weights."""
        raise TypeError("uncomp: remove the patch before the model is copied or saved whole: handle.remove()")

    def __deepcopy__(self, memo):
        """Refused."""
        return self.__reduce_ex__(4)


class Forwards(NotCopied):
    """Hooks on the module that owns the decoder layers of one patched model.

    Args:
        model: what was patched. stack: its module with the layers. facts: its sizes, and which layers are compressed.
        recordings: of this model's decode steps. hidden: what shortens prompts, or None.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stack: torch.nn.Module,
        config: UncompConfig,
        facts: Any,
        recordings: Recordings,
        hidden: HiddenPruning | None,
    ) -> None:
        self._model, self._config, self._facts = model, config, facts
        self._recordings, self._hidden = recordings, hidden
        self._arguments = list(inspect.signature(type(stack).forward).parameters)[1:]
        self._active = threading.local()  # .shared: the cache of the forward that this thread is in
        self._last: weakref.ref | None = None
        self._ledger: Ledger | None = None  # of the last cache; holds none of its keys and values
        self._capacity = 0  # of its first layer when the ledger was made
        self._hooks = [
            stack.register_forward_pre_hook(self._begin, with_kwargs=True),
            stack.register_forward_hook(self._commit, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Takes the hooks away; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def removed(self) -> bool:
        """Whether the hooks are gone."""
        return not self._hooks

    @property
    def cache(self) -> Cache | None:
        """The cache of the last forward, while somebody holds it."""
        return self._last() if self._last is not None else None

    def active(self) -> SharedState | None:
        """The cache of the forward that this thread is in."""
        return getattr(self._active, "shared", None)

    def ledger(self, cache: Cache | None = None) -> Ledger | None:
        """What `cache`, by default the last one, stores or stored; None before the first forward."""
        cache = self.cache if cache is None else cache
        if cache is not None:
            self._ledger = ledger_of(cache)
        return self._ledger

    def enter(self, shared: SharedState | None) -> None:
        """This thread runs forwards of a cache that are begun and counted elsewhere; None: no more."""
        before, self._active.shared = self.active(), shared
        for state in (before, shared):
            if state is not None:
                state.hooked = state is shared

    def _begin(self, stack, args, kwargs):
        shared = self.active()
        if shared is not None and shared.recording:  # a step that calls the whole model, see hf/loop.py
            return None
        given = dict(zip(self._arguments, args, strict=False))
        given.update(kwargs)
        states = given.get("inputs_embeds")
        states = given.get("input_ids") if states is None else states
        if states is None:
            return None
        use_cache = given.get("use_cache")
        cache = given.get("past_key_values")
        if use_cache is None:
            use_cache = getattr(stack.config, "use_cache", False)
        if cache is None:
            if not use_cache:
                return None
            cache = UncompCache(self._model, self._config)
            args, kwargs = (), {**given, "past_key_values": cache}
        if states.dim() < 2 or 0 in states.shape[:2]:
            raise ValueError(
                f"uncomp: a forward needs [B, T] tokens, B and T at least 1; got a tensor {list(states.shape)}"
            )
        shared = self._adopt(cache)
        mask = given.get("attention_mask")
        if isinstance(mask, dict):
            mask = self._two_dimensional(mask)
        positions = given.get("position_ids")
        if positions is None and getattr(stack, MARK, None) is not None:
            # Keys that are rotated again must know the positions that the model makes up: padding counts.
            shared.clock.check_step(states.shape[1])
            end = shared.clock.columns + states.shape[1]
            positions = torch.arange(shared.clock.columns, end, device="cpu").unsqueeze(0)
        shared.clock.begin(states.shape[0], states.shape[1], mask, positions)
        shared.hooked, shared.replayed = True, False
        if shared.clock.chunk.lengths is not None:
            shared.checked = shared.verdict = None
        if self._hidden is not None:
            self._hidden.begin(shared, given, states)
        low_rank = getattr(stack, MARK, None)
        if low_rank is not None and low_rank.config.exact_prefill:
            run_exactly(shared.clock.columns == 0 and shared.clock.chunk.lengths is not None)
        self._active.shared, self._last = shared, weakref.ref(cache)
        return args, kwargs

    _begin.uncomp = True

    def _commit(self, stack, args, kwargs, output):
        shared = self.active()
        if shared is None or shared.recording:
            return
        self._active.shared = None
        shared.hooked = False
        run_exactly(False)
        if self._hidden is not None:
            self._hidden.end(shared)
        if output is None or shared.waiting or not (shared.replayed or shared.complete()):
            shared.clock.fail()
            return
        prompt = shared.clock.chunk.lengths is not None
        shared.clock.commit()
        cache = self.cache
        capacity = shared.layers[0].ragged.capacity
        if cache is not None and (prompt or capacity != self._capacity):
            self._ledger, self._capacity = ledger_of(cache), capacity

    _commit.uncomp = True

    def _adopt(self, cache) -> SharedState:
        shared = getattr(cache, "uncomp", None)
        if shared is not None:
            if shared.recordings is not self._recordings:  # a cache of the user's, or of an earlier patch
                self._register(cache, shared)
            if shared.schedule is not None and self._hidden is None and shared.clock.seen is None:
                raise ValueError(
                    "uncomp: this cache's configuration prunes the prompt (prefill); patch the model with the same"
                )
            if shared.shape != self._facts.shape or shared.managed != self._facts.managed:
                raise ValueError("uncomp: this cache was made for another model")
            return shared
        if type(cache) is not DynamicCache:
            raise NotImplementedError(
                f"uncomp: a {type(cache).__name__} cannot be compressed; pass none, or an UncompCache"
            )
        if cache.offloading:
            raise NotImplementedError("uncomp: an offloaded cache cannot be compressed")
        if cache.get_seq_length() > 0:
            raise NotImplementedError(
                "uncomp: this DynamicCache already holds tokens that were not compressed; start with a new cache"
            )
        for index in self._facts.managed:
            if index < len(cache.layers) and type(cache.layers[index]) is not DynamicLayer:
                raise NotImplementedError(
                    f"uncomp: layer {index} of the cache is a {type(cache.layers[index]).__name__}"
                )
        shared = SharedState(self._config, self._facts.shape, self._facts.managed)
        new_layers(cache, shared)
        self._register(cache, shared)
        return shared

    def _register(self, cache, shared: SharedState) -> None:
        """Steps of this cache are recorded here; its arenas come back when it is dropped."""
        shared.recordings = self._recordings
        shared.ran_under = self._model.config.get_text_config(decoder=True)
        shared.checked = shared.verdict = None
        shared.claimed = []
        if shared.cache is None or shared.cache() is not cache:  # a copy that was made by other means than fork
            shared.follow(cache)

    @staticmethod
    def _two_dimensional(masks: dict):
        found = masks.get("full_attention")
        if found is not None and found.dim() != 2:
            raise NotImplementedError(f"uncomp: a {found.dim()}-D attention mask cannot be compressed under")
        return found
