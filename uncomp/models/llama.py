# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, SmolLM (a Llama by its config), Granite, Phi-3: one attention module a layer, full attention."""

from uncomp.models.base import Family

LLAMA = Family("llama", ("llama",))
GRANITE = Family("granite", ("granite",))
PHI3 = Family("phi3", ("phi3",))
