# SPDX-License-Identifier: Apache-2.0
"""compact_kv: the kept tokens of one layer's prompt, equal and unequal rows, and a whole batch."""

import torch
from harness import Case
from rivals import compiled

from uncomp import ops

DIM = 128


def inputs(i, dtype, batch, heads, tokens, lengths):
    """Dense K and V, and sorted random tokens of every row."""
    generator = torch.Generator("cuda").manual_seed(i)
    key, value = (
        torch.randn(batch, heads, tokens, DIM, device="cuda", dtype=dtype, generator=generator) for _ in range(2)
    )
    index = [torch.randperm(tokens, device="cuda", generator=generator)[:k].sort().values for k in lengths]
    return key, value, index


def case(name, batch, heads, tokens, lengths, dtype=torch.bfloat16):
    total = sum(lengths)

    def ours(i):
        key, value, rows = inputs(i, dtype, batch, heads, tokens, lengths)
        index = torch.cat(rows).to(torch.int32)
        starts = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
        return lambda: ops.compact_kv(key, value, index, starts, starts, total)

    def index_select(i):
        key, value, rows = inputs(i, dtype, batch, heads, tokens, lengths)
        index = torch.cat([row + r * tokens for r, row in enumerate(rows)])
        keys, values = key.view(-1, DIM), value.view(-1, DIM)
        return lambda: (keys.index_select(0, index), values.index_select(0, index))

    def gather(i):
        key, value, rows = inputs(i, dtype, batch, heads, tokens, lengths)
        index = torch.stack(rows).view(batch, heads, -1, 1).expand(-1, -1, -1, DIM)
        return lambda: (key.gather(2, index), value.gather(2, index))

    rivals = {"index_select": index_select, "torch.compile": compiled(index_select)}
    if len(set(lengths)) == 1:
        rivals["gather"] = gather
    moved = total * (4 * DIM * dtype.itemsize + 8)
    return Case("compact_kv", name, str(dtype)[6:], moved, ours, rivals)


def cases() -> list[Case]:
    return [
        case("8x1552 of 32768", 1, 8, 32768, [1552] * 8),
        case("8x1552 mean, 2:1, of 32768", 1, 8, 32768, [2069, 1035] * 4),
        case("8x13107 of 131072", 1, 8, 131072, [13107] * 8),
        case("256x1552 of 4096", 32, 8, 4096, [1552] * 256),
        case("8x1552 of 1048576", 1, 8, 1048576, [1552] * 8),
        case("4096x384 of 1024", 512, 8, 1024, [384] * 4096),
    ]
