# SPDX-License-Identifier: Apache-2.0
"""decode_attention: one decode step of a layer with 32 query and 8 KV heads of 128 channels, equal and ragged rows."""

import torch
from harness import Case
from latents import RANK, eager_keys, key_transform
from rivals import compiled, varlen_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from uncomp import ops

HEADS, ROWS, DIM = 32, 8, 128
GROUP = HEADS // ROWS
SCALE = DIM**-0.5


def inputs(i, lengths, batch, dtype):
    generator = torch.Generator("cuda").manual_seed(i)
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    slots = sum(lengths)
    query = torch.randn(batch, HEADS, 1, DIM, device="cuda", generator=generator).to(dtype)
    keys, values = (torch.randn(slots, DIM, device="cuda", dtype=dtype, generator=generator) for _ in range(2))
    return query, keys, values, starts, torch.tensor(lengths, dtype=torch.int32, device="cuda")


def case(name, lengths, batch=1, dtype=torch.bfloat16):
    longest, equal = max(lengths), len(set(lengths)) == 1

    def ours(i):
        args = inputs(i, lengths, batch, dtype)
        return lambda: ops.decode_attention(*args, SCALE)

    def varlen(i):
        query, keys, values, starts, _ = inputs(i, lengths, batch, dtype)
        queries = query.view(batch * ROWS, GROUP, DIM)  # a row is a sequence of one token and g heads
        one = torch.arange(batch * ROWS + 1, device="cuda", dtype=torch.int32)
        keys, values = keys.unsqueeze(1), values.unsqueeze(1)
        return lambda: varlen_attention(queries, keys, values, one, starts, 1, longest)

    def dense(backend):
        def make(i):
            query, keys, values, _, _ = inputs(i, lengths, batch, dtype)
            keys, values = (x.view(batch, ROWS, longest, DIM) for x in (keys, values))

            def call():
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

            return call

        return make

    def plain(i):
        query, keys, values, _, _ = inputs(i, lengths, batch, dtype)
        query = query.view(batch * ROWS, GROUP, DIM)
        keys, values = (x.view(batch * ROWS, longest, DIM) for x in (keys, values))

        def call():
            logits = (query @ keys.mT).float() * SCALE
            return torch.softmax(logits, -1).to(dtype) @ values, logits.logsumexp(-1)

        return call

    moved = 2 * sum(lengths) * DIM * dtype.itemsize + 2 * batch * HEADS * DIM * dtype.itemsize
    rivals = {"varlen": varlen}
    if equal:
        rivals |= {"torch eager": plain, "torch.compile": compiled(plain)}
        rivals |= {"flash": dense(SDPBackend.FLASH_ATTENTION), "cudnn": dense(SDPBackend.CUDNN_ATTENTION)}
    return Case("decode_attention", name, str(dtype)[6:], moved, ours, rivals)


def latent_case(length, dtype=torch.bfloat16):
    """Keys and values of RANK numbers; the rivals are full width on as many tokens, and plain torch on the latents."""

    def latents(i):
        query, *_, starts, lens = inputs(i, [length] * ROWS, 1, dtype)
        generator = torch.Generator("cuda").manual_seed(i)
        rows = (torch.randn(ROWS * length, RANK, device="cuda", dtype=dtype, generator=generator) for _ in range(2))
        position = torch.arange(length, device="cuda", dtype=torch.int32).repeat(ROWS)
        return query, *rows, starts, lens, position, key_transform(ROWS, DIM, dtype)

    def ours(i):
        *args, position, transform = latents(i)
        return lambda: ops.decode_attention(*args, SCALE, key_transform=transform, slot_position=position)

    def full_width(i):
        args = inputs(i, [length] * ROWS, 1, dtype)
        return lambda: ops.decode_attention(*args, SCALE)

    def eager(i):
        query, keys, values, _, _, position, transform = latents(i)
        keys, values = (x.view(ROWS, length, RANK) for x in (keys, values))

        def call():
            made = eager_keys(keys, position.view(ROWS, length), transform)
            return torch.nn.functional.scaled_dot_product_attention(query.view(ROWS, GROUP, DIM), made, values)

        return call

    moved = ROWS * length * (2 * RANK * dtype.itemsize + 4) + 2 * HEADS * DIM * dtype.itemsize
    rivals = {"full width": full_width, "torch eager": eager, "torch.compile": compiled(eager)}
    return Case("decode_attention", f"8x{length}, latents of {RANK}", str(dtype)[6:], moved, ours, rivals)


def cases() -> list[Case]:
    budgets = [2070, 1034] * 4  # two to one, mean 1552
    skewed = [32768 * 8 * 8 // 15] + [32768 * 8 // 15] * 7
    return [
        case("8x32768", [32768] * 8),
        case("8x131072", [131072] * 8),
        case("8x1552 mean, budgets 2:1", budgets),
        case("B 32, 8x1552 mean", budgets * 32, 32),
        case("B 256, 8x1552 mean", budgets * 256, 256),
        case("one row 8x the others, 8x32768 mean", skewed),
        case("8x1048576", [1048576] * 8),
        case("B 512, 8x200", [200] * 4096, 512),
        case("8x32768 fp16", [32768] * 8, dtype=torch.float16),
        *(latent_case(length) for length in (16384, 32768, 131072)),
    ]
