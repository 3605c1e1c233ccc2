# SPDX-License-Identifier: Apache-2.0
"""What changes the width of stored keys and values: one package a method. docs/policies.md has the formulas."""

from uncomp.transforms import lorc

__all__ = ["lorc"]
