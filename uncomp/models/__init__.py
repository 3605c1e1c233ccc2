# SPDX-License-Identifier: Apache-2.0
"""Model families by the model type of their config."""

from __future__ import annotations

from typing import Any

from uncomp.config import UncompConfig
from uncomp.models.base import Family, ModelFacts
from uncomp.models.gemma import GEMMA3
from uncomp.models.llama import GRANITE, LLAMA, PHI3
from uncomp.models.mistral import MISTRAL
from uncomp.models.qwen import QWEN2, QWEN3

FAMILIES: list[Family] = [LLAMA, GRANITE, PHI3, MISTRAL, QWEN2, QWEN3, GEMMA3]


def family_of(config: Any) -> Family:
    """The family of a model's config.

    Raises:
        NotImplementedError: none knows this model type; the message lists those that are known.
    """
    text = config.get_text_config(decoder=True)
    for family in FAMILIES:
        if text.model_type in family.model_types:
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise NotImplementedError(f"uncomp: model type {text.model_type!r} is not supported; supported: {known}")


def describe(config: Any, uncomp: UncompConfig) -> ModelFacts:
    """What the cache must know of a model; see Family.facts."""
    return family_of(config).facts(config, uncomp)
