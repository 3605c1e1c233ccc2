# SPDX-License-Identifier: Apache-2.0
"""Tests of uncomp.hf; run against every transformers release that `make test` installs."""
