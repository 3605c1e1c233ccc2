# SPDX-License-Identifier: Apache-2.0
"""compress_layer: all work that compresses one layer of one prompt, as the policy "uncomp" calls it, in one graph.

32 query and 8 KV heads of 128 channels: queries measured, rows grouped and given budgets, keys scored, tokens chosen,
K and V packed, votes seeded.
"""

import torch
from harness import Case

from uncomp import ops

HEADS, ROWS, DIM, WINDOW, POOL, GROUPS = 32, 8, 128, 8, 7, 2
GROUP = HEADS // ROWS
SCALE = DIM**-0.5


def inputs(i, tokens, dtype):
    """Queries, keys and values as transformers lays them out: heads behind tokens in memory."""
    generator = torch.Generator("cuda").manual_seed(i)

    def states(heads):
        x = torch.randn(1, tokens, heads, DIM, device="cuda", dtype=dtype, generator=generator)
        return x.transpose(1, 2)

    return states(HEADS), states(ROWS), states(ROWS)


def case(tokens, mean, dtype=torch.bfloat16):
    total = ROWS * mean

    def ours(i):
        query, key, value = inputs(i, tokens, dtype)
        length = torch.full((1,), tokens, dtype=torch.int32, device="cuda")
        row_length = torch.full((ROWS,), tokens, dtype=torch.int32, device="cuda")
        budget = torch.full((1,), total, dtype=torch.int32, device="cuda")
        weight = torch.tensor([2, 1], dtype=torch.int32, device="cuda")
        newest = query[:, :, tokens - WINDOW :]
        at = torch.arange(tokens - WINDOW, tokens, dtype=torch.int32, device="cuda").view(1, -1)
        shapes = [(WINDOW, total), (total,), (ROWS,), (total,)]
        state = [torch.empty(shape, dtype=torch.int32, device="cuda") for shape in shapes]

        def call():
            entropy, _ = ops.matrix_entropy(ops.matrix_spectrum(query, DIM // 4), DIM // 4, DIM)
            group, _ = ops.group_heads(entropy.view(1, ROWS, GROUP).mean(-1), GROUPS)
            keep = ops.allocate_budget(group, weight, length, budget, WINDOW).view(-1)
            scores, lse = ops.window_scores(newest, key, SCALE)
            index, starts = ops.select_tokens(scores, row_length, keep, total, sink=0, window=WINDOW, pool=POOL)
            keys, values, position, kept = ops.compact_kv(key, value, index, starts, starts, total)
            ops.seed_votes_(newest, lse, at, keys, position, starts, kept, *state, SCALE)
            return keys, values

        return call

    moved = (HEADS + ROWS) * tokens * DIM * dtype.itemsize + total * 4 * DIM * dtype.itemsize
    return Case("compress_layer", f"{tokens} tokens, 8x{mean}", str(dtype)[6:], moved, ours)


def cases() -> list[Case]:
    return [case(32768, 1552), case(131072, 1552)]
