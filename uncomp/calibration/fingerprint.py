# SPDX-License-Identifier: Apache-2.0
"""What a profile must agree with: the sizes of a model and a hash of what its config says it computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Entries of a model's config that say how it is run or where it came from, not what it computes.
_NOT_HASHED = {"attn_implementation", "dtype", "torch_dtype", "transformers_version", "use_cache"}
# Entries that decide the states of the heads. The hash of a model is over these alone: a release of transformers that
# adds entries of its own, or a file that names its model in another way, leaves it as it is.
_DECISIVE = (
    "attention_bias",
    "attention_multiplier",
    "embedding_multiplier",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "logits_scaling",
    "mlp_bias",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "vocab_size",
)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {str(k): _plain(v) for k, v in value.items() if not str(k).startswith("_") and k not in _NOT_HASHED}
        return dict(sorted(kept.items()))
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def config_hash(config: Mapping[str, Any]) -> str:
    """Fingerprint of a model's config: sha256 of its entries in sorted order, as 64 hex digits.

    Entries that begin with an underscore, and those that say how the model is run (dtype, attention implementation,
    use_cache, library version), do not enter, at any depth.
    """
    return hashlib.sha256(json.dumps(_plain(config), separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class ModelFacts:
    """What a profile must agree with: layers L, query heads Hq, KV heads Hkv, head dim D; type, config_hash."""

    type: str
    L: int
    Hq: int
    Hkv: int
    D: int
    hash: str

    def __str__(self) -> str:
        """The fingerprint in a line."""
        return f"{self.type}, {self.L} layers, {self.Hq}/{self.Hkv} heads of {self.D}, config {self.hash[:12]}"


def _short(value: Any) -> Any:
    """Numbers as formats agree on them: 1e-5 and its float32, 100000 and 100000.0 are the same."""
    if isinstance(value, Mapping):
        return {name: _short(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(entry) for entry in value]
    return (int(value) if value == int(value) else f"{value:.6g}") if isinstance(value, float) else value


def model_hash(text_config: Any) -> str:
    """config_hash of what decides the states of a model's heads; equal for a model and the same one as a GGUF file.

    Args:
        text_config: the config of its decoder, as transformers has it.
    """
    entries = text_config.to_dict()
    return config_hash({name: _short(entries[name]) for name in _DECISIVE if entries.get(name) is not None})
