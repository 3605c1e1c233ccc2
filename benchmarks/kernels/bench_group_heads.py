# SPDX-License-Identifier: Apache-2.0
"""group_heads: one layer's rows, a batch of them, and the rows of a whole model."""

import torch
from harness import Case
from rivals import compiled

from uncomp import ops


def case(count, rows, num_groups):
    def entropy(i):
        return torch.rand(count, rows, device="cuda", generator=torch.Generator("cuda").manual_seed(i))

    def ours(i):
        values = entropy(i)
        return lambda: ops.group_heads(values, num_groups)

    def sort(i):
        values = entropy(i)
        sizes = [rows // num_groups] * num_groups
        sizes[-1] += rows - sum(sizes)
        ids = torch.repeat_interleave(torch.arange(num_groups), torch.tensor(sizes)).int().cuda().expand(count, rows)
        places = torch.arange(rows, device="cuda", dtype=torch.int32).expand(count, rows)

        def run():
            order = values.sort(stable=True).indices
            group = torch.empty_like(ids).scatter_(1, order, ids)
            return group, torch.empty_like(ids).scatter_(1, order, places)

        return run

    moved = count * rows * (4 + 4 + 4)
    rivals = {"sort": sort, "torch.compile": compiled(sort)}
    return Case("group_heads", f"{count}x{rows} rows, {num_groups} groups", "float32", moved, ours, rivals)


def cases() -> list[Case]:
    return [case(1, 32, 2), case(1, 32, 8), case(256, 8, 2), case(1, 1024, 32)]
