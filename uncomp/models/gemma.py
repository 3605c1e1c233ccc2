# SPDX-License-Identifier: Apache-2.0
"""Gemma 3: most layers slide over the newest tokens and stay as they are, the global ones are compressed."""

from uncomp.models.base import Family

GEMMA3 = Family("gemma3", ("gemma3_text",))
