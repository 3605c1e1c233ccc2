# SPDX-License-Identifier: Apache-2.0
"""decode_evict_: one step of full rows, 32 query and 8 KV heads of 128 channels, against the rule in plain torch."""

import torch
from harness import Case
from latents import RANK, key_transform
from rivals import compiled

from uncomp import ops

HEADS, ROWS, DIM, VOTE_WINDOW = 32, 8, 128, 8
GROUP = HEADS // ROWS
WINDOW, POOL = 8, 7
SCALE = DIM**-0.5
BITS = 27  # of a vote, for a window of 8


def inputs(i, lengths, batch, dtype):
    """Token and state as decode_evict_ takes them; every row is full."""
    generator = torch.Generator("cuda").manual_seed(i)
    slots, num_rows = sum(lengths), len(lengths)

    def tensor(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)

    def ints(values):
        return torch.as_tensor(values, device="cuda").to(torch.int32)

    token = [tensor(batch, HEADS, 1, DIM), tensor(batch, ROWS, 1, DIM), tensor(batch, ROWS, 1, DIM)]
    order = ints(torch.cat([torch.arange(n) for n in lengths]))
    votes = torch.randint(0, 2**BITS // 1000, (VOTE_WINDOW, slots), device="cuda", generator=generator).int()
    return [
        *token,
        ints([10**6] * batch),
        ints(torch.tensor([0, *lengths]).cumsum(0)),
        ints(lengths),
        tensor(slots, DIM),
        tensor(slots, DIM),
        order.clone(),
        votes,
        votes.sum(0, dtype=torch.int32),
        ints([0] * num_rows),
        order,
    ]


def eager_step(args, length):
    """The rule for rows of equal length, as one would write it in torch."""
    query, key, value, position, _, _, key_rows, value_rows, slot_position, votes, vote_sum, vote_step, order = args
    rows = key_rows.shape[0] // length
    query, key, value = query.view(rows, GROUP, DIM), key.view(rows, 1, DIM), value.view(rows, 1, DIM)
    keys, values = key_rows.view(rows, length, DIM), value_rows.view(rows, length, DIM)
    logits = torch.cat([query @ keys.mT, query @ key.mT], -1).float() * SCALE
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp()
    out = weights[..., :-1].to(query.dtype) @ values + weights[..., -1:].to(query.dtype) * value
    vote = (weights.mean(1) * 2**BITS).round().int()
    ring_row = vote_step.view(rows, 1, 1).long() % VOTE_WINDOW
    ring = votes.view(VOTE_WINDOW, rows, length)
    ring_at = ring_row.view(1, rows, 1).expand(1, rows, length)
    sums = vote_sum.view(rows, length)
    sums += vote[:, :-1] - ring.gather(0, ring_at)[0]
    ring.scatter_(0, ring_at, vote[None, :, :-1])
    places = order.view(rows, length)
    candidates = sums.gather(1, places.long())[:, : length + 1 - WINDOW].float()
    pooled = torch.nn.functional.max_pool1d(candidates, POOL, 1, POOL // 2)
    place = pooled.argmin(1, keepdim=True)
    slot = places.gather(1, place.to(torch.int64))
    keys.scatter_(1, slot.long()[..., None].expand(-1, 1, DIM), key)
    values.scatter_(1, slot.long()[..., None].expand(-1, 1, DIM), value)
    slot_position.view(rows, length).scatter_(
        1, slot.long(), position.repeat_interleave(rows // len(position))[:, None]
    )
    own = torch.zeros_like(ring[:, :, :1]).scatter_(0, ring_row.view(1, rows, 1), vote[None, :, -1:])
    ring.scatter_(2, slot.long()[None].expand(VOTE_WINDOW, rows, 1), own)
    sums.scatter_(1, slot.long(), vote[:, -1:])
    at = torch.arange(length, device=order.device).expand(rows, length)
    moved = torch.cat([places, slot], 1).gather(1, at + (at >= place))
    places.copy_(moved)
    vote_step += 1
    return out, lse


def case(name, lengths, batch=1, dtype=torch.bfloat16):
    equal = len(set(lengths)) == 1

    def ours(i):
        args = inputs(i, lengths, batch, dtype)
        return lambda: ops.decode_evict_(*args, window=WINDOW, sink=0, pool=POOL, scale=SCALE)

    def attention_alone(i):
        args = inputs(i, lengths, batch, dtype)
        return lambda: ops.decode_attention(args[0], args[6], args[7], args[4], args[5], SCALE)

    def eager(i):
        args = inputs(i, lengths, batch, dtype)
        return lambda: eager_step(args, lengths[0])

    # K and V once; ring row and running sum read and written; order read and, half of it on average, moved.
    moved = sum(lengths) * (2 * DIM * dtype.itemsize + 16 + 4 + 4)
    rivals = {"decode_attention alone": attention_alone}
    if equal:
        rivals |= {"torch eager": eager, "torch.compile": compiled(eager)}
    return Case("decode_evict_", name, str(dtype)[6:], moved, ours, rivals)


def latent_case(length, dtype=torch.bfloat16):
    """Keys and values of RANK numbers; the rival is full width on as many tokens."""

    def ours(i):
        args = inputs(i, [length] * ROWS, 1, dtype)
        for at in (1, 2, 6, 7):  # key, value, key_rows, value_rows
            args[at] = args[at][..., :RANK].contiguous()
        transform = key_transform(ROWS, DIM, dtype)
        return lambda: ops.decode_evict_(*args, window=WINDOW, sink=0, pool=POOL, scale=SCALE, key_transform=transform)

    def full_width(i):
        args = inputs(i, [length] * ROWS, 1, dtype)
        return lambda: ops.decode_evict_(*args, window=WINDOW, sink=0, pool=POOL, scale=SCALE)

    moved = ROWS * length * (2 * RANK * dtype.itemsize + 4 + 16 + 4 + 4)
    shape = f"8x{length}, latents of {RANK}"
    return Case("decode_evict_", shape, str(dtype)[6:], moved, ours, {"full width": full_width})


def cases() -> list[Case]:
    budgets = [2070, 1034] * 4  # two to one, mean 1552
    linear = [518 + i * 2068 // 7 for i in range(8)]  # linear over eight groups, as the default is
    return [
        case("8x1552", [1552] * 8),
        case("8x1552 mean, budgets 2:1", budgets),
        case("8x1552 mean, linear budgets", linear),
        case("B 32, 8x1552", [1552] * 8 * 32, 32),
        case("B 32, 8x1552 mean, budgets 2:1", budgets * 32, 32),
        case("B 32, 8x1552 mean, linear budgets", linear * 32, 32),
        case("B 256, 8x1552", [1552] * 8 * 256, 256),
        case("B 256, 8x1552 mean, linear budgets", linear * 256, 256),
        case("8x32768", [32768] * 8),
        case("8x131072", [131072] * 8),
        case("B 512, 8x200", [200] * 4096, 512),
        latent_case(1552),
    ]
