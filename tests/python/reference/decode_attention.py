# SPDX-License-Identifier: Apache-2.0
"""decode_attention, one head at a time in float64."""

import torch


def attend(query, keys, values, scale):
    """softmax(scale * q k^T) v and its log-sum-exp for one query [Dk]; nothing to see gives 0 and -inf."""
    if keys.shape[0] == 0:
        return torch.zeros(values.shape[1], dtype=torch.float64), -torch.inf
    logits = scale * (keys @ query)
    lse = torch.logsumexp(logits, 0)
    return torch.exp(logits - lse) @ values, lse


def decode_attention(query, key_rows, value_rows, row_start, row_len, scale):
    query, key_rows, value_rows = (x.cpu().double() for x in (query, key_rows, value_rows))
    batch, heads = query.shape[:2]
    out = torch.zeros(batch, heads, 1, value_rows.shape[1], dtype=torch.float64)
    lse = torch.full((batch, heads), -torch.inf, dtype=torch.float64)
    rows = row_len.shape[0] // max(batch, 1)
    for b in range(batch):
        for h in range(heads):
            row = b * rows + h // (heads // rows)
            start = int(row_start[row])
            live = slice(start, start + int(row_len[row]))
            out[b, h, 0], lse[b, h] = attend(query[b, h, 0], key_rows[live], value_rows[live], scale)
    return out, lse
