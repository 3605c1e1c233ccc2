# SPDX-License-Identifier: Apache-2.0
"""SnapKV: every row the same budget, tokens by the attention of the last queries (arXiv 2404.14469)."""

from typing import ClassVar

from uncomp.policies.base import Policy, register_policy


@register_policy
class SnapKV(Policy):
    """The newest `window` tokens and those that the last `window` queries look at most."""

    name = "snapkv"
    defaults: ClassVar = {"window": 32}
