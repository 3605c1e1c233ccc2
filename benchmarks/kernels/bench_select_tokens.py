# SPDX-License-Identifier: Apache-2.0
"""select_tokens: the prompt of one layer, long prompts, a batch, and one row that holds a whole layer."""

import torch
from harness import Case
from rivals import compiled
from torch.nn.functional import max_pool1d

from uncomp import ops

WINDOW, POOL = 8, 7


def case(rows, columns, keep):
    def scores(i):
        # Attention mass is spread over many octaves, most of it near zero.
        generator = torch.Generator("cuda").manual_seed(i)
        return torch.randn(rows, columns, device="cuda", generator=generator).mul(2).exp() / columns

    def ours(i):
        x = scores(i)
        length = torch.full((rows,), columns, dtype=torch.int32, device="cuda")
        keep_len = torch.full((rows,), keep, dtype=torch.int32, device="cuda")
        return lambda: ops.select_tokens(x, length, keep_len, rows * keep, sink=0, window=WINDOW, pool=POOL)

    def topk_and_sort(i):
        x = scores(i)
        newest = torch.arange(columns - WINDOW, columns, device="cuda").expand(rows, WINDOW)

        def run():
            pooled = max_pool1d(x[:, : columns - WINDOW], POOL, 1, POOL // 2)
            best = pooled.topk(keep - WINDOW, dim=1, sorted=False).indices.sort(1).values
            return torch.cat([best, newest], 1).int()

        return run

    def topk_alone(i):
        x = scores(i)
        return lambda: x.topk(keep, dim=1, sorted=False).indices

    moved = rows * (columns + keep + 3) * 4
    rivals = {
        "max_pool, topk, sort": topk_and_sort,
        "torch.compile": compiled(topk_and_sort),
        "topk alone": topk_alone,
    }
    return Case("select_tokens", f"{rows}x{columns} k={keep}", "float32", moved, ours, rivals)


def cases() -> list[Case]:
    return [
        case(8, 32768, 1552),
        case(8, 131072, 1552),
        case(256, 32768, 1552),
        case(8, 4096, 384),
        case(2048, 1024, 384),
        case(1, 262144, 12416),
        case(8, 1048576, 1552),
        case(4096, 2048, 384),
    ]
