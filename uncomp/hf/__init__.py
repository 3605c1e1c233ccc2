# SPDX-License-Identifier: Apache-2.0
"""Everything that touches transformers: versions, loading, the cache class, the attention function."""
