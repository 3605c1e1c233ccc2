# SPDX-License-Identifier: Apache-2.0
"""append_kv_: a decode step and a chunk of a prompt behind the rows of one layer."""

import torch
from harness import REPLAYS, Case, Resettable
from rivals import compiled

from uncomp import ops

DIM = 128


def inputs(i, dtype, batch, heads, tokens, taken):
    """New tokens, and an arena whose rows hold `taken` tokens and have room until the next reset."""
    generator = torch.Generator("cuda").manual_seed(i)
    key, value = (
        torch.randn(batch, heads, tokens, DIM, device="cuda", dtype=dtype, generator=generator) for _ in range(2)
    )
    room = taken + (REPLAYS + 1) * tokens
    rows = batch * heads
    arena = [torch.zeros(rows * room, DIM, device="cuda", dtype=dtype) for _ in range(2)]
    slots = torch.zeros(rows * room, dtype=torch.int32, device="cuda")
    return key, value, room, arena, slots


def case(batch, tokens, heads=8, taken=16, dtype=torch.bfloat16):
    rows = batch * heads

    def ours(i):
        key, value, room, arena, slots = inputs(i, dtype, batch, heads, tokens, taken)
        position = torch.arange(tokens, dtype=torch.int32, device="cuda").repeat(batch, 1)
        row_start = torch.arange(0, rows * room + 1, room, dtype=torch.int32, device="cuda")
        row_len = torch.full((rows,), taken, dtype=torch.int32, device="cuda")
        return Resettable(
            lambda: ops.append_kv_(key, value, position, row_start, row_len, *arena, slots),
            lambda: row_len.fill_(taken),
        )

    def index_copy(i):
        key, value, room, arena, _ = inputs(i, dtype, batch, heads, tokens, taken)
        new = torch.arange(tokens, device="cuda") + taken
        index = (torch.arange(rows, device="cuda").view(-1, 1) * room + new).flatten()
        keys, values = key.view(-1, DIM), value.view(-1, DIM)
        return lambda: (arena[0].index_copy_(0, index, keys), arena[1].index_copy_(0, index, values))

    rivals = {"index_copy_": index_copy, "torch.compile": compiled(index_copy)}
    moved = rows * tokens * (4 * DIM * dtype.itemsize + 4) + batch * tokens * 4
    return Case("append_kv_", f"{rows} rows, T {tokens}", str(dtype)[6:], moved, ours, rivals)


def cases() -> list[Case]:
    return [case(1, 1), case(1, 512), case(512, 1)]
