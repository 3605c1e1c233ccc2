# SPDX-License-Identifier: Apache-2.0
"""ragged_attention, one query at a time in float64."""

import torch

from .decode_attention import attend


def join(out, lse, other_out, other_lse):
    """What one softmax over both sets of keys would have given."""
    both = torch.logaddexp(torch.as_tensor(lse, dtype=torch.float64), other_lse)
    if both == -torch.inf:
        return torch.zeros_like(out), both
    result = torch.zeros_like(out)
    for part, part_lse in ((out, lse), (other_out, other_lse)):
        if part_lse != -torch.inf:
            result += torch.exp(torch.as_tensor(part_lse) - both) * part
    return result, both


def ragged_attention(
    query,
    key_rows,
    value_rows,
    row_start,
    row_len,
    scale,
    *,
    key=None,
    value=None,
    other_out=None,
    other_lse=None,
    first=None,
    length=None,
):
    query, key_rows, value_rows = (x.cpu().double() for x in (query, key_rows, value_rows))
    key, value, other_out, other_lse = (
        None if x is None else x.cpu().double() for x in (key, value, other_out, other_lse)
    )
    batch, heads, tokens = query.shape[:3]
    out = torch.zeros(batch, heads, tokens, value_rows.shape[1], dtype=torch.float64)
    lse = torch.full((batch, heads, tokens), -torch.inf, dtype=torch.float64)
    rows = row_len.shape[0] // max(batch, 1)
    for b in range(batch):
        begin = 0 if first is None else int(first[b])
        end = tokens if length is None else begin + int(length[b])
        for h in range(heads):
            row = b * rows + h // (heads // rows)
            start = int(row_start[row])
            live = slice(start, start + int(row_len[row]))
            for t in range(begin, end):
                keys, values = key_rows[live], value_rows[live]
                if key is not None:
                    kv_head = h // (heads // key.shape[1])
                    keys = torch.cat([keys, key[b, kv_head, begin : t + 1]])
                    values = torch.cat([values, value[b, kv_head, begin : t + 1]])
                one, one_lse = attend(query[b, h, t], keys, values, scale)
                if other_out is not None:
                    one, one_lse = join(one, one_lse, other_out[b, h, t], other_lse[b, h, t])
                out[b, h, t], lse[b, h, t] = one, one_lse
    return out, lse
