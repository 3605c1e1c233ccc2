# SPDX-License-Identifier: Apache-2.0
"""A layer of the cache that transformers sees: logical length outside, stored length inside.

`update` hands the new keys and values back untouched and leaves the layer in a thread-local slot; the attention
function takes it from there and stores, attends and compresses in one go (UncompLayer.attend).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from uncomp import eviction, extension
from uncomp.attention import dense_attention
from uncomp.cache import RaggedLayer
from uncomp.hf import compat
from uncomp.hf.clock import Clock
from uncomp.hf.shared import SharedState, leave_pending
from uncomp.latent import Latents
from uncomp.view import PromptView


class UncompLayer(CacheLayerMixin):
    """One layer of a compressed cache, as transformers' Cache expects it."""

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, shared: SharedState, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        self.ragged: RaggedLayer | None = None
        self.finished = 0  # columns that this layer has taken in

    # ---- what transformers calls
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the arena is made when the first prompt is compressed."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Hands key and value on; what is stored is decided by the attention function, which must be "uncomp"."""
        self.shared.check_attention()
        leave_pending(self, key_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns seen, padding included: the model's logical length; in a recorded step, which must not know it, 1."""
        return 1 if self.shared.recording else self.shared.clock.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a full cache would: other layers of the model read this mask. The first thing that a forward asks."""
        self.shared.check_attention()
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no bound on the logical length."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def is_croppable(self) -> bool:
        """Only appended tokens can be taken back."""
        return self.shared.config.grows

    @property
    def is_initialized(self) -> bool:
        """True once something is stored."""
        return self.ragged is not None

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """CacheLayerMixin sets it; what is stored decides."""

    @property
    def keys(self) -> Tensor | None:
        """[C, Dk] arena, for counters of bytes."""
        return self.ragged.key_rows if self.ragged is not None else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        """CacheLayerMixin sets it; the arena is made by compression."""

    @property
    def values(self) -> Tensor | None:
        """[C, Dv] arena."""
        return self.ragged.value_rows if self.ragged is not None else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        """CacheLayerMixin sets it; the arena is made by compression."""

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.shared.clock.batch

    max_batch_size = batch_size

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys and values."""
        return self.ragged.key_rows.dtype if self.ragged is not None else None

    @property
    def device(self) -> torch.device | None:
        """Where this layer lies."""
        return self.ragged.key_rows.device if self.ragged is not None else None

    def offload(self) -> None:
        """Refused."""
        raise NotImplementedError("uncomp: a compressed cache cannot be offloaded")

    prefetch = offload

    def reset(self) -> None:
        """Forgets everything that was seen."""
        self.ragged, self.finished = None, 0
        if self.index == 0:
            self.shared.clock, self.shared.waiting, self.shared.debt = Clock(), [], 0
            self.shared.pruned = self.shared.reached = None
            self.shared.generation += 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i continues as sequence beam_idx[i]."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one behind the other."""
        batch = self.shared.clock.batch
        if batch > 0:
            self._select(torch.arange(batch, device="cpu").repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Takes back the newest tokens: -n removes n, 0 none; older versions of transformers say the length to keep."""
        clock = self.shared.clock
        self.shared.settle()
        seen = self.finished
        target = compat.crop_target(int(max_length), seen)
        remove = seen - target
        if remove <= 0:
            return
        if self.ragged is not None:
            self.ragged.drop_newest(clock.newest(remove))
        self.finished = target
        if self.index == len(self.shared.layers) - 1:
            clock.rewind(remove)

    def _select(self, index: Tensor) -> None:
        if self.ragged is not None:
            before = self.ragged.key_rows
            try:
                self.ragged.select(index)
            except BaseException:
                if self.index > 0:  # layers before this one have changed already
                    self.shared.clock.abandon()
                raise
            self.shared.generation += self.ragged.key_rows is not before
        if self.index == len(self.shared.layers) - 1:
            self.shared.clock.select(index.tolist())

    # ---- what the attention function calls
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        latent: Latents | None = None,
    ) -> Tensor:
        """Attention of the new tokens over themselves and what is stored; then they are stored.

        Args:
            query: [B, Hq, T, D]. key: [B, Hkv, T, D]. value: [B, Hkv, T, Dv]. All rotated.
            latent: what is stored; None: keys and values.
        Returns:
            [B, Hq, T, Dv], or where stored tokens took part the width of stored values; 0 at padding.
        """
        clock, config = self.shared.clock, self.shared.config
        chunk = clock.chunk
        if self.ragged is None:
            self.shared.share_rows(1 if latent is None else latent.codec.shared)
        self._same_width(latent, (value if latent is None else latent.values).shape[3])
        if latent is not None and chunk.lengths is not None:
            latent.offset = self.shared.offset(query.device)
        if not self.shared.recording:
            self.shared.settle()
            self.finished = clock.columns + chunk.tokens
        if chunk.lengths is None:
            with torch.no_grad():
                position = clock.position(query.device)
                if not self.shared.recording:
                    self.make_room(1)
                    self.ragged.count(1)
                value = self._met(value, latent)
                return eviction.decode_step(self.ragged, config, query, key, value, position, scale, latent)
        pack = self.shared.prompt(query.device)[2]
        if pack is None:
            return self._take_in(query, key, value, scale, latent)
        if latent is not None:
            rows, values = (extension.moved(t, pack) for t in (latent.rows, latent.values))
            latent = Latents(rows, values, latent.codec, latent.offset)

        def run(*states) -> Tensor:
            return self._take_in(*states, latent)

        return extension.packed(pack, run, query, key, value, scale)

    @staticmethod
    def _met(value: Tensor, latent: Latents | None) -> Tensor:
        """Values as attention meets them: what is stored, unless heads share it."""
        return value if latent is None or latent.codec.shared > 1 else latent.values

    def _same_width(self, latent: Latents | None, value_dim: int) -> None:
        """Refuses a cache whose rows were stored by other projections than those that run now."""
        if self.ragged is None:
            return
        codec = None if latent is None else latent.codec
        if self.ragged.codec is not codec or self.ragged.value_rows.shape[1] != value_dim:
            raise ValueError(
                "uncomp: this cache was filled before the model's projections were replaced (uncomp.lorc); start with "
                "a new cache"
            )

    def _take_in(self, query: Tensor, key: Tensor, value: Tensor, scale: float, latent: Latents | None) -> Tensor:
        """Attends densely, with gradients where they are on; what is stored is never part of a graph."""
        if self.ragged is None:
            out = dense_attention(query, key, value, self.shared.prompt(query.device)[0], scale)
            with torch.no_grad():
                if self.shared.pruned is not None:
                    self.shared.pruned.score(self.index, query, key, scale)
                self._store(query, key, value, scale, latent)
            return out
        with torch.no_grad():
            return self._store(query, key, value, scale, latent)

    def _store(self, query: Tensor, key: Tensor, value: Tensor, scale: float, latent: Latents | None) -> Tensor | None:
        shared, chunk = self.shared, self.shared.clock.chunk
        query, key, value = query.detach(), key.detach(), value.detach()
        if latent is not None:
            latent.rows, latent.values = latent.rows.detach(), latent.values.detach()
            value = self._met(value, latent)
        out = None
        if self.ragged is not None:
            before = self.ragged.key_rows
            if latent is not None:
                shared.generation += self.ragged.shift(latent.offset)
            out, taken = extension.extend(
                self.ragged, shared.compressor, self.index, query, key, value, chunk, scale, latent
            )
            if isinstance(taken, RaggedLayer):
                shared.generation += taken.key_rows is not before
                return out
        else:
            lengths, position, _ = shared.prompt(key.device)
            states = (query, key, value, lengths, scale, position)
            view = PromptView(self.index, shared.compressor.model_shape, shared.config, *states, latent=latent)
            taken = shared.compressor.measure(view)
        if not shared.compressor.whole_model:
            self._keep(*shared.compressor.compress([taken]))
            return out
        taken.view.release(shared.config.vote_window)
        shared.waiting.append(taken)
        if len(shared.waiting) == len(shared.layers):
            waiting, shared.waiting = shared.waiting, []
            for layer, ragged in zip(shared.layers, shared.compressor.compress(waiting), strict=True):
                layer._keep(ragged)
        return out

    def make_room(self, tokens: int) -> None:
        """Gives every row at least `tokens` free slots, with decode="grow"."""
        before = self.ragged.key_rows
        self.ragged.ensure_free(tokens)
        self.shared.generation += self.ragged.key_rows is not before

    def _keep(self, made: RaggedLayer) -> None:
        """Keeps a packed layer, in memory that a recorded step knows where it can."""
        shared = self.shared
        if shared.recordings is None:
            self.ragged = made
        elif self.ragged is not None and self.ragged.fits(made):
            self.ragged.copy_(made)
        else:
            shared.generation += 1
            longer = self.ragged is None and shared.config.extend == "append" and not shared.config.grows
            self.ragged = shared.recordings.take(self.index, made, shared, for_now=longer)
