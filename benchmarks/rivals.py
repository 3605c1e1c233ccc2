# SPDX-License-Identifier: Apache-2.0
"""Rivals whose signature differs between torch versions."""

import inspect


def varlen_attention(query, key, value, query_start, key_start, longest_query, longest_key):
    """torch.nn.attention.varlen over packed rows; before 2.13 grouped heads need no flag, from then on they do."""
    from torch.nn.attention.varlen import varlen_attn

    flag = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(query, key, value, query_start, key_start, longest_query, longest_key, **flag)
