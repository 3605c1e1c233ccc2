# SPDX-License-Identifier: Apache-2.0
"""Compresses the key/value cache of language models head by head, by the information each head carries."""

from uncomp import ops
from uncomp._extension import build_info, limits, raise_device_errors, warmup
from uncomp._version import __version__

__all__ = ["__version__", "build_info", "limits", "ops", "raise_device_errors", "warmup"]
