# SPDX-License-Identifier: Apache-2.0
"""gather_tokens: half of 32K hidden states with cos and sin, as one layer of hidden-state pruning moves them."""

import torch
from harness import Case
from rivals import compiled

from uncomp import ops


def inputs(i, dtype, tokens, wanted, width, head_dim):
    generator = torch.Generator("cuda").manual_seed(i)
    hidden = torch.randn(1, tokens, width, device="cuda", generator=generator).to(dtype)
    cos, sin = torch.randn(2, 1, tokens, head_dim, device="cuda", generator=generator).to(dtype).unbind()
    index = torch.randperm(tokens, device="cuda", generator=generator)[:wanted].sort().values
    return [hidden, cos, sin], index


def case(tokens, wanted, width=4096, head_dim=128, dtype=torch.bfloat16):
    def sources(i):
        return inputs(i, dtype, tokens, wanted, width, head_dim)

    def ours(i):
        tensors, index = sources(i)
        wanted_tokens = index.to(torch.int32).view(1, -1)
        return lambda: ops.gather_tokens(tensors, wanted_tokens)

    def index_select(i):
        tensors, index = sources(i)
        return lambda: [t.index_select(1, index) for t in tensors]

    def gather(i):
        tensors, index = sources(i)
        wide = [index.view(1, -1, 1).expand(1, -1, t.shape[2]) for t in tensors]
        return lambda: [t.gather(1, w) for t, w in zip(tensors, wide, strict=True)]

    moved = 2 * wanted * (width + 2 * head_dim) * dtype.itemsize + 4 * wanted
    rivals = {"index_select": index_select, "torch.compile": compiled(index_select), "gather": gather}
    return Case("gather_tokens", f"{wanted} of {tokens}, E {width}", str(dtype)[6:], moved, ours, rivals)


def cases() -> list[Case]:
    return [case(32768, 16384), case(4096, 1536)]
