# SPDX-License-Identifier: Apache-2.0
"""The version, written once: packaging and the C++ build read it here."""

__version__ = "0.1.0"
