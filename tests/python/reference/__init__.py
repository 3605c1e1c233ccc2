# SPDX-License-Identifier: Apache-2.0
"""The second truth: every operator in plain Python and float64, written from the papers, never from a kernel."""
