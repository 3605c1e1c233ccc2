# SPDX-License-Identifier: Apache-2.0
"""The cache that transformers sees, and how its layers are made."""

from __future__ import annotations

import copy

from transformers.cache_utils import Cache, DynamicCache

from uncomp.config import UncompConfig
from uncomp.hf import compat
from uncomp.hf.layer import UncompLayer
from uncomp.hf.shared import SharedState
from uncomp.models import describe


def new_layers(cache: Cache, shared: SharedState) -> None:
    """Replaces the full-attention entries of an empty cache by compressed layers; the others stay as they are."""
    made = shared.layers = [UncompLayer(shared, i) for i in range(len(shared.managed))]
    if cache.layer_class_to_replicate is not None:
        cache.layer_class_to_replicate = None
    while len(cache.layers) <= max(shared.managed):
        cache.layers.append(made[0])  # replaced below; every index up to the last managed one is managed
    for index, layer in zip(shared.managed, made, strict=True):
        cache.layers[index] = layer
    cache.uncomp = shared
    shared.follow(cache)


class UncompCache(DynamicCache):
    """A compressed cache for `generate(past_key_values=...)` of a model with attn_implementation="uncomp".

    Args:
        model: the model, or its config.
        config: how to compress; default UncompConfig().
    """

    def __init__(self, model, config: UncompConfig | None = None) -> None:
        compat.check()
        model_config = getattr(model, "config", model)
        super().__init__(config=model_config)
        config = UncompConfig() if config is None else config
        if not isinstance(config, UncompConfig):
            raise TypeError(f"uncomp.UncompCache: config must be an UncompConfig; got {type(config).__name__}")
        facts = describe(model_config, config)
        new_layers(self, SharedState(config, facts.shape, facts.managed))

    def fork(self) -> UncompCache:
        """A copy that shares no memory: ask one context several questions."""
        twin = copy.deepcopy(self)
        twin.uncomp.follow(twin)
        return twin

    def memory_bytes(self) -> int:
        """Bytes of keys and values in compressed layers, free slots included."""
        return sum(layer.ragged.kv_bytes for layer in self.uncomp.layers if layer.ragged is not None)
