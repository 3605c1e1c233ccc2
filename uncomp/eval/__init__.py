# SPDX-License-Identifier: Apache-2.0
"""How much a compressed cache costs in quality."""
