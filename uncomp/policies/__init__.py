# SPDX-License-Identifier: Apache-2.0
"""Which tokens stay: one file a method, all through the same cache. docs/policies.md has the formulas."""

from uncomp.policies.base import Policy, make_policy, register_policy
from uncomp.policies.snapkv import SnapKV

__all__ = ["Policy", "SnapKV", "make_policy", "register_policy"]
