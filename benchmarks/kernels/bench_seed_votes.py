# SPDX-License-Identifier: Apache-2.0
"""seed_votes_: the first votes of a freshly packed layer, 1552 tokens a row on average."""

import torch
from harness import Case
from rivals import compiled

from uncomp import ops

HEADS, ROWS, DIM, WINDOW = 32, 8, 128, 8
GROUP = HEADS // ROWS
SCALE = DIM**-0.5


def inputs(i, lengths, batch, dtype):
    generator = torch.Generator("cuda").manual_seed(i)
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    slots = sum(lengths)
    query = torch.randn(batch, HEADS, WINDOW, DIM, device="cuda", generator=generator).to(dtype)
    keys = torch.randn(slots, DIM, device="cuda", dtype=dtype, generator=generator)
    lse = torch.full((batch, HEADS, WINDOW), 12.0, device="cuda")
    at = torch.arange(32768 - WINDOW, 32768, device="cuda", dtype=torch.int32).expand(batch, WINDOW).contiguous()
    position = torch.cat([torch.arange(n, device="cuda", dtype=torch.int32) for n in lengths])
    lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return query, lse, at, keys, position, starts, lens


def case(name, lengths, batch=1, dtype=torch.bfloat16):
    equal, slots = len(set(lengths)) == 1, sum(lengths)

    def ours(i):
        args = inputs(i, lengths, batch, dtype)
        shapes = [(WINDOW, slots), (slots,), (batch * ROWS,), (slots,)]
        state = [torch.empty(shape, dtype=torch.int32, device="cuda") for shape in shapes]
        return lambda: ops.seed_votes_(*args, *state, SCALE)

    def eager(i):
        query, lse, _, keys, *_ = inputs(i, lengths, batch, dtype)
        keys = keys.view(batch, ROWS, lengths[0], DIM)

        def call():
            logits = (query.view(batch, ROWS, GROUP * WINDOW, DIM) @ keys.mT).float() * SCALE
            weight = (logits.view(batch, HEADS, WINDOW, -1) - lse[..., None]).exp()
            votes = (weight.view(batch, ROWS, GROUP, WINDOW, -1).mean(2) * 2**27).round().to(torch.int32)
            return votes, votes.sum(2)

        return call

    moved = slots * (DIM * dtype.itemsize + 4 + 4 * WINDOW + 8)
    rivals = {"torch": eager, "torch.compile": compiled(eager)} if equal else {}
    return Case("seed_votes_", name, str(dtype)[6:], moved, ours, rivals)


def cases() -> list[Case]:
    budgets = [2070, 1034] * 4  # two to one, mean 1552
    return [
        case("8x1552", [1552] * 8),
        case("8x1552 mean, budgets 2:1", budgets),
        case("B 32, 8x1552 mean", budgets * 32, 32),
    ]
