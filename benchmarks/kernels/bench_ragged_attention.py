# SPDX-License-Identifier: Apache-2.0
"""ragged_attention: a turn or chunk of new tokens over the compressed rows of a layer."""

import torch
from harness import Case
from rivals import compiled, varlen_attention

from uncomp import ops

HEADS, ROWS, DIM = 32, 8, 128
GROUP = HEADS // ROWS
SCALE = DIM**-0.5


def inputs(i, lengths, tokens, dtype):
    generator = torch.Generator("cuda").manual_seed(i)

    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)

    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    rows = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    past = (random(sum(lengths), DIM), random(sum(lengths), DIM), starts, rows)
    return random(1, HEADS, tokens, DIM), random(1, ROWS, tokens, DIM), random(1, ROWS, tokens, DIM), past


def case(name, lengths, tokens, with_new=False, dtype=torch.bfloat16):
    longest = max(lengths)

    def ours(i):
        query, key, value, past = inputs(i, lengths, tokens, dtype)
        new = {"key": key, "value": value} if with_new else {}
        return lambda: ops.ragged_attention(query, *past, SCALE, **new)

    def padded(i):
        query, key, value, (keys, values, starts, rows) = inputs(i, lengths, tokens, dtype)
        columns = torch.arange(longest, device="cuda")
        live = columns < rows[:, None]
        index = (starts[:-1, None] + columns).clamp_max(keys.shape[0] - 1)
        dense = [x[index].masked_fill(~live[..., None], 0).unsqueeze(0) for x in (keys, values)]
        mask = live.repeat_interleave(GROUP, 0)[None, :, None].expand(1, HEADS, tokens, longest)
        if with_new:
            dense = [torch.cat(pair, 2) for pair in zip(dense, (key, value), strict=True)]
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()
            mask = torch.cat([mask, causal.expand(1, HEADS, tokens, tokens)], -1)
        mask = mask.contiguous()
        attention = torch.nn.functional.scaled_dot_product_attention
        return lambda: attention(query, *dense, attn_mask=mask, enable_gqa=True)

    def varlen(i):
        query, _, _, (keys, values, starts, _) = inputs(i, lengths, tokens, dtype)
        # A row is a sequence of T tokens and g heads.
        packed = query.view(ROWS, GROUP, tokens, DIM).transpose(1, 2).reshape(ROWS * tokens, GROUP, DIM)
        query_starts = torch.arange(ROWS + 1, device="cuda", dtype=torch.int32) * tokens
        keys, values = keys.unsqueeze(1), values.unsqueeze(1)
        return lambda: varlen_attention(packed, keys, values, query_starts, starts, tokens, longest)

    moved = 2 * (sum(lengths) + HEADS * tokens + (ROWS * tokens if with_new else 0)) * DIM * dtype.itemsize
    rivals = {"sdpa, padded mask": padded, "torch.compile": compiled(padded)}
    if not with_new:
        rivals["varlen"] = varlen
    return Case("ragged_attention", name, str(dtype)[6:], moved, ours, rivals)


def cases() -> list[Case]:
    budgets = [2070, 1034] * 4
    return [
        case("T 512 over 8x1552", [1552] * 8, 512),
        case("T 8192 over 8x1552", [1552] * 8, 8192),
        case("T 512 over 8x1552, budgets 2:1, with new tokens", budgets, 512, with_new=True),
        case("T 4096 over 8x1552, budgets 2:1, with new tokens", budgets, 4096, with_new=True),
        case("T 4 over 8x32768", [32768] * 8, 4),
    ]
