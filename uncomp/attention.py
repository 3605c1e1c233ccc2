# SPDX-License-Identifier: Apache-2.0
"""Dense causal attention over a prompt, on real tokens only; padding gives zeros."""

from __future__ import annotations

import itertools

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from uncomp.types import Lengths


def dense_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float) -> Tensor:
    """Exact causal attention of a left-padded batch, without a mask tensor.

    Sequences of one length run together; each run reads views of its real columns.

    Args:
        query: [B, Hq, S, D]. key, value: [B, Hkv, S, D], [B, Hkv, S, Dv].
        lengths: real tokens of each sequence, the last ones of its columns.
        scale: factor of the logits.
    Returns:
        [B, Hq, S, Dv]; 0 at padding.
    """
    if not lengths.padded:
        return _causal(query, key, value, scale)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for first, run in itertools.groupby(range(len(lengths.first)), key=lambda b: lengths.first[b]):
        begin, *rest = run
        span = slice(begin, (rest[-1] if rest else begin) + 1)
        if first < lengths.seq_len:
            out[span, :, first:] = _causal(query[span, :, first:], key[span, :, first:], value[span, :, first:], scale)
    return out


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, scale=scale, enable_gqa=group > 1
    )
