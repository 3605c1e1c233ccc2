# SPDX-License-Identifier: Apache-2.0
"""What a model's heads look like over many texts, measured once and kept in a file."""
