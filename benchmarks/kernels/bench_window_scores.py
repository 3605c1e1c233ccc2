# SPDX-License-Identifier: Apache-2.0
"""window_scores: the last W queries of a prompt against all keys of a layer, lse inside."""

import torch
from harness import Case
from rivals import colreduce, compiled

from uncomp import ops

HEADS, ROWS, DIM = 32, 8, 128
GROUP = HEADS // ROWS
SCALE = DIM**-0.5


def inputs(i, tokens, window, dtype):
    """Tensors as transformers lays them out: heads behind tokens in memory."""
    generator = torch.Generator("cuda").manual_seed(i)
    query = torch.randn(1, window, HEADS, DIM, device="cuda", dtype=dtype, generator=generator).transpose(1, 2)
    key = torch.randn(1, tokens, ROWS, DIM, device="cuda", dtype=dtype, generator=generator).transpose(1, 2)
    return query, key


def case(tokens, window, dtype=torch.bfloat16):
    def ours(i):
        query, key = inputs(i, tokens, window, dtype)
        return lambda: ops.window_scores(query, key, SCALE)

    def eager_of(i):
        query, key = inputs(i, tokens, window, dtype)
        newest = torch.arange(tokens - window, tokens, device="cuda")
        behind = torch.arange(tokens, device="cuda")[None] > newest[:, None]

        def call():
            logits = query.reshape(1, ROWS, GROUP * window, DIM) @ key.mT * SCALE
            logits = logits.view(1, HEADS, window, tokens).masked_fill(behind, float("-inf"))
            return torch.softmax(logits, -1, dtype=torch.float32).sum(2).view(ROWS, GROUP, tokens).mean(1)

        return call

    def column_sums(i):
        query, key = inputs(i, tokens, window, dtype)
        every_head = key.repeat_interleave(GROUP, 1)  # the package has no grouped heads; the copy is not timed
        return lambda: colreduce(query, every_head).view(ROWS, GROUP, tokens).mean(1)

    moved = (ROWS * tokens + HEADS * window) * DIM * dtype.itemsize + ROWS * tokens * 4 + HEADS * window * 4
    rivals = {"torch": eager_of, "torch.compile": compiled(eager_of), "flash-colreduce": column_sums}
    return Case("window_scores", f"8x{tokens} W={window}", str(dtype)[6:], moved, ours, rivals)


def cases() -> list[Case]:
    return [case(32768, 8), case(32768, 32), case(131072, 8), case(4096, 8), case(32768, 64), case(1048576, 8)]
