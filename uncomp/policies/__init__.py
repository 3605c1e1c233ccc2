# SPDX-License-Identifier: Apache-2.0
"""Which tokens stay: one file a method, all through the same cache. docs/policies.md has the formulas."""

from uncomp.policies.adakv import AdaKV
from uncomp.policies.base import Policy, make_policy, register_policy
from uncomp.policies.full import Full
from uncomp.policies.h2o import H2O
from uncomp.policies.pyramidkv import PyramidKV
from uncomp.policies.random_scores import Random
from uncomp.policies.snapkv import SnapKV
from uncomp.policies.streaming_llm import StreamingLLM
from uncomp.policies.tova import TOVA
from uncomp.policies.uncomp import UNComp, UNCompStage

__all__ = [
    "H2O",
    "TOVA",
    "AdaKV",
    "Full",
    "Policy",
    "PyramidKV",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "UNComp",
    "UNCompStage",
    "make_policy",
    "register_policy",
]
