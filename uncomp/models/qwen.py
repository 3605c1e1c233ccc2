# SPDX-License-Identifier: Apache-2.0
"""Qwen2, Qwen2.5 and Qwen3."""

from uncomp.models.base import Family

QWEN2 = Family("qwen2", ("qwen2",))
QWEN3 = Family("qwen3", ("qwen3",))
