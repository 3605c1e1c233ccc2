# SPDX-License-Identifier: Apache-2.0
"""LoRC by its public name: key and value projections of low rank. Source: docs/policies.md "LoRC"."""

from uncomp.hf import compat

compat.check()  # a release that is not supported is refused in one line, before modules that build on it

from uncomp.transforms.lorc import *  # noqa: E402, F403
from uncomp.transforms.lorc import __all__  # noqa: E402, F401
