# SPDX-License-Identifier: Apache-2.0
"""Mistral: later releases use full attention; version 0.1 uses a sliding window in every layer."""

from uncomp.models.base import Family

MISTRAL = Family("mistral", ("mistral",))
