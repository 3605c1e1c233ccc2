# SPDX-License-Identifier: Apache-2.0
"""What a model family must tell: where its layers are, which of them can be compressed, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uncomp._extension import limits
from uncomp.calibration.fingerprint import model_hash
from uncomp.config import UncompConfig
from uncomp.types import CacheShape

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModelFacts:
    """A model as the cache needs it."""

    family: str
    shape: CacheShape
    managed: list[int]  # layers that are compressed
    sliding: list[int]  # layers left as transformers has them


@dataclass(frozen=True)
class Family:
    """A group of models that keep the same things in the same places.

    Most families are data: a name and the model types of their configs. One that differs overrides a method.
    """

    name: str
    model_types: tuple[str, ...]

    def text_config(self, config: Any) -> Any:
        """The config of the decoder."""
        return config.get_text_config(decoder=True)

    def layer_types(self, config: Any) -> list[str]:
        """Kind of attention of every layer, in transformers' words."""
        given = getattr(config, "layer_types", None)
        if given is not None:
            return list(given)[: config.num_hidden_layers]
        kind = SLIDING if getattr(config, "sliding_window", None) is not None else FULL
        return [kind] * config.num_hidden_layers

    def head_dim(self, config: Any) -> int:
        """Channels of a head."""
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def refuse(self, config: Any) -> str | None:
        """Why a model of this config cannot be compressed; None if it can."""
        if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
            return "its layers share keys and values"
        if getattr(config, "attn_logit_softcapping", None):
            return "its attention logits are soft-capped"
        if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False) is True:
            return "its attention is not causal"
        return None

    def text_stack(self, model: Any) -> Any:
        """The module that owns the decoder layers."""
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        while not hasattr(decoder, "layers"):
            inner = getattr(decoder, "language_model", None) or getattr(decoder, "model", None)
            if inner is None:
                raise NotImplementedError(f"uncomp: {type(model).__name__} has no module that owns .layers")
            decoder = inner
        return decoder

    def attention(self, layer: Any) -> Any:
        """The attention module of a decoder layer."""
        return layer.self_attn

    def mlp(self, layer: Any) -> Any:
        """The MLP of a decoder layer, from [B, S, E] to [B, S, E]."""
        return layer.mlp

    def facts(self, config: Any, uncomp: UncompConfig) -> ModelFacts:
        """Sizes, and which layers are compressed.

        Raises:
            NotImplementedError: the model or one of its layers cannot be compressed, with the reason.
        """
        text = self.text_config(config)
        reason = self.refuse(text)
        if reason:
            raise NotImplementedError(f"uncomp: {text.model_type} models of this config cannot be compressed: {reason}")
        kinds = self.layer_types(text)
        other = sorted({k for k in kinds if k not in (FULL, SLIDING)})
        if other:
            raise NotImplementedError(
                f"uncomp: layer {kinds.index(other[0])} of {text.model_type} uses {other[0]}; it cannot be compressed"
            )
        managed = [i for i, k in enumerate(kinds) if k == FULL]
        sliding = [i for i, k in enumerate(kinds) if k == SLIDING]
        if not managed:
            raise NotImplementedError(
                f"uncomp: all {len(kinds)} layers of this {text.model_type} model use sliding-window attention, whose "
                "cache is bounded already; there is nothing to compress"
            )
        if sliding and not uncomp.skip_sliding:
            raise NotImplementedError(
                f"uncomp: layer {sliding[0]} of {text.model_type} uses sliding-window attention, which is left alone; "
                "pass skip_sliding=True to accept"
            )
        num_q_heads, num_kv_heads = text.num_attention_heads, text.num_key_value_heads
        bound, dim = limits(), self.head_dim(text)
        if dim % bound["head_dim_multiple"] or dim > bound["max_head_dim"]:
            raise NotImplementedError(
                f"uncomp: head_dim of {text.model_type} must be a multiple of {bound['head_dim_multiple']} up to "
                f"{bound['max_head_dim']}; got {dim}"
            )
        if num_q_heads // num_kv_heads > bound["max_group_size"]:
            raise NotImplementedError(
                f"uncomp: at most {bound['max_group_size']} query heads may share a key/value head; {text.model_type} "
                f"has {num_q_heads // num_kv_heads}"
            )
        rows = num_q_heads if uncomp.rows == "query_head" else num_kv_heads
        sizes = (len(managed), num_q_heads, num_kv_heads, dim, rows)
        shape = CacheShape(*sizes, tuple(managed), len(kinds), text.model_type, model_hash(text))
        return ModelFacts(self.name, shape, managed, sliding)
