# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: the first tokens and the newest ones (arXiv 2309.17453)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from uncomp.policies.base import Policy, register_policy
from uncomp.types import DecodeRule
from uncomp.view import LayerView


@register_policy
class StreamingLLM(Policy):
    """Keeps `sinks` first tokens and the b - sinks newest: s_j = j. In decoding the oldest that is no sink leaves.

    The paper numbers positions anew inside the cache; here tokens keep their original ones.
    """

    name = "streaming_llm"
    blind = True
    defaults: ClassVar = {"sinks": 4, "pool_width": 1}

    def __init__(self, config, shape) -> None:
        super().__init__(config, shape)
        if config.pool_width != 1:
            raise ValueError(
                f"uncomp: pool_width of streaming_llm must be 1: positions are not pooled; got {config.pool_width}"
            )

    def score(self, view: LayerView) -> Tensor:
        """[R, columns] float32, the position itself; exact below 2^24."""
        return view.position.float()

    def decode_rule(self) -> DecodeRule:
        """The oldest token that is no sink."""
        return DecodeRule("position", newest=self.config.window, sinks=self.config.sinks)
