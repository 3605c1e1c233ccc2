# SPDX-License-Identifier: Apache-2.0
"""What the layers of one cache have in common, and the slot in which a layer's new keys wait for the attention."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from uncomp.compressor import Compressor, Measured
from uncomp.config import UncompConfig
from uncomp.graph import Recordings, StepGraph
from uncomp.hf.clock import Clock
from uncomp.policies import make_policy
from uncomp.pruning import PrunedPrompt, schedule_for
from uncomp.types import CacheShape, Lengths

if TYPE_CHECKING:
    from uncomp.hf.layer import UncompLayer

NAME = "uncomp"  # of the attention that stores what an `update` leaves, as transformers knows it
_pending = threading.local()


def leave_pending(layer: UncompLayer, key: Tensor) -> None:
    """Leaves a layer for the attention function that gets this very key next.

    Raises:
        RuntimeError: nobody took what this cache left before: the model runs another attention.
    """
    stale = getattr(_pending, "slot", None)
    _pending.slot = None
    if stale is not None:  # nobody took it: another attention ran, or an exception came in between
        stale[0].shared.clock.abandon()
    if stale is not None and stale[0].shared is layer.shared:
        raise RuntimeError(
            'uncomp: an UncompCache needs attn_implementation="uncomp": call '
            'model.set_attn_implementation("uncomp"), or use uncomp.patch(model, config)'
        )
    _pending.slot = (layer, key)


def take_pending(key: Tensor) -> UncompLayer | None:
    """The layer whose `update` returned this very key tensor, once."""
    slot = getattr(_pending, "slot", None)
    if slot is None:
        return None
    layer, kept_key = slot
    if kept_key is not key:
        layer.shared.clock.fail()
        _pending.slot = None
        raise NotImplementedError(
            "uncomp: the model changed the keys between the cache and the attention; its layers cannot be compressed"
        )
    _pending.slot = None
    return layer


def forget_pending() -> None:
    """Drops what an `update` left behind that no attention took."""
    _pending.slot = None


def _dropped(shared: SharedState) -> None:
    if shared.recordings is not None:
        shared.recordings.bury(shared)
    else:
        shared.let_go()


class SharedState:
    """What the layers of one cache have in common."""

    def __init__(self, config: UncompConfig, shape: CacheShape, managed: Sequence[int]) -> None:
        self.config, self.shape, self.managed = config, shape, list(managed)
        self.compressor = Compressor(config, shape, make_policy(config, shape))
        self.schedule = schedule_for(config, shape)  # stages between which prompts lose tokens, or None
        self.pruned: PrunedPrompt | None = None  # the prompt that loses them now
        self.reached: list[list[int]] | None = None  # [L][B] tokens of the last pruned prompt that reached each layer
        self.clock = Clock()
        self.hooked = False  # a hook on the model begins and commits the forwards
        self.recordings: Recordings | None = None  # of a patched model
        self.ran_under: Any = None  # text config of the patched model whose forwards it was in
        self.cache: weakref.ref | None = None  # the cache whose state this is, where it is a patched model's
        self.recording = False  # a step is being recorded: nothing runs, so nothing is counted
        self.replayed = False  # the step of the current forward was a replay
        self.plain = False  # the current step must not be compiled: something forbids recordings
        self.debt = 0  # replayed steps that the layers have not counted yet
        self.generation = 0  # how often memory of a layer moved
        self.claimed: list[StepGraph] = []  # recordings whose arenas this prompt is packed into
        self.checked: StepGraph | None = None  # recording that was found valid since the last prompt or turn
        self.verdict: tuple | None = None  # (module, a weight's address, what forbids recordings), since then too
        self._free: int | None = None  # see free_slots
        self.layers: list[UncompLayer] = []
        self.waiting: list[Measured] = []  # a plan over the whole model: layers that are still dense

    def __deepcopy__(self, memo) -> SharedState:
        """A copy without the memory of recorded steps."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.recordings = twin.cache = twin.checked = twin.verdict = twin.pruned = None
        twin.claimed = []
        for name in ("clock", "layers", "waiting"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        return twin

    def follow(self, cache: Any) -> None:
        """Lets go of everything when the cache is dropped."""
        self.cache = weakref.ref(cache)
        weakref.finalize(cache, _dropped, self).atexit = False

    def let_go(self) -> None:
        """Layers know this object: without this only a garbage collection would free them."""
        self.layers, self.waiting = [], []

    def share_rows(self, heads: int) -> None:
        """From now on a row stands for `heads` KV heads; called before a layer stores anything.

        Raises:
            NotImplementedError: the heads would keep different tokens.
        """
        shape = replace(self.shape, rows=self.shape.rows // heads)
        if self.compressor.model_shape == shape:
            return
        policy = make_policy(self.config, shape)
        blind = policy.blind and (self.config.grows or policy.decode_rule().kind == "position")
        if heads > 1 and self.config.rows == "query_head":
            raise NotImplementedError(
                'uncomp: rows must be "kv_head" where heads share latents (uncomp.lorc, granularity); got "query_head"'
            )
        if heads > 1 and not (self.config.keeps_all or blind):
            raise NotImplementedError(
                f"uncomp: policy {self.config.policy} keeps what single heads attend to, but {heads} heads share what "
                'is stored (uncomp.lorc, granularity); use "full", "streaming_llm", or "random" with decode="grow"'
            )
        self.compressor = Compressor(self.config, shape, policy)

    def check_attention(self) -> None:
        """Called before a forward that no patch began stores anything.

        Raises:
            RuntimeError: the patch was removed, so that another attention would run; the cache stays as it is.
        """
        if self.hooked or self.ran_under is None or self.ran_under._attn_implementation == NAME:
            return
        raise RuntimeError(
            "uncomp: the model's patch was removed; this cache can be used again once the model is patched again"
        )

    def settle(self) -> None:
        """Lets the layers count the steps that were replayed."""
        steps, self.debt, self._free = self.debt, 0, None
        for layer in self.layers if steps else ():
            layer.finished += steps
            layer.ragged.count(steps)

    def complete(self) -> bool:
        """True if every layer has taken in the forward that is running."""
        columns = self.clock.columns + self.clock.chunk.tokens
        return all(layer.finished == columns for layer in self.layers)

    def prompt(self, device: torch.device) -> tuple[Lengths, Tensor | None, Tensor | None]:
        """Of the prompt or turn in the layer that runs, on its device: real tokens, original positions where tokens
        were dropped, and how the real ones are moved to the end where they are not there."""
        chunk, pruned = self.clock.chunk, self.pruned
        if pruned is None:
            return chunk.lengths, None, None if chunk.pack is None else chunk.pack.to(device)
        # What is dropped in front of a layer is dropped where its input lies, which may be the device before.
        rest = (None if t is None else t.to(device) for t in (pruned.position, pruned.pack))
        return pruned.lengths, *rest

    def offset(self, device: torch.device) -> Tensor | None:
        """[B] int32, model position of each sequence's first real token; None where all are 0."""
        if not any(self.clock.offset or ()):
            return None
        with torch.inference_mode(False):  # a turn in another mode must be able to write it
            return torch.tensor([n or 0 for n in self.clock.offset], dtype=torch.int32, device=device)

    def free_slots(self) -> int | None:
        """Tokens that every row can take in before it must be enlarged; None where rows keep their length."""
        if not self.config.grows:
            return None
        if self._free is None:
            self._free = min(layer.ragged.free for layer in self.layers)
        return self._free - self.debt

    def make_room(self) -> None:
        """Gives every row a free slot, with decode="grow"."""
        self.settle()
        for layer in self.layers:
            layer.make_room(1)
