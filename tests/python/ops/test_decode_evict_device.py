# SPDX-License-Identifier: Apache-2.0
"""decode_evict_ on a device: rows of many slices, absurd device data, graphs, and the same bits every time."""

from itertools import pairwise

import pytest
import torch
from evict_state import CHANGED, checked_step, defaults, make_state, make_token, run
from support import capture_graph

pytestmark = pytest.mark.gpu
HALF = [torch.float32, torch.float16, torch.bfloat16]


def test_small_room_evicts_the_oldest_that_is_no_sink():
    state = make_state([4, 2], [4, 2]).clone("cuda")
    gone = [state.row(0).positions[3], state.row(1).positions[0]]
    run(state, make_token(1, 2, 1, 64, position=999), **defaults(window=4, sink=3))
    for r in range(2):
        assert gone[r] not in state.row(r).positions
        state.assert_sound(r)


def test_absurd_device_data_stays_inside_its_rows():
    state = make_state([6, 9, 8], [6, 9, 8], poison=False)
    state.order.fill_(2**31 - 1)
    state.row_len.copy_(torch.tensor([2**31 - 1, 9, -5], dtype=torch.int32))
    state.vote_step.fill_(-(2**31))
    after = state.clone("cuda")
    out, _ = run(after, make_token(1, 3, 1, 64, position=99), **defaults(window=8, sink=3))
    torch.cuda.synchronize()
    assert out.isfinite().all()
    assert after.row_len.tolist() == [6, 9, 1]
    for r, (begin, end) in enumerate(pairwise(state.row_start.tolist())):
        assert (after.slot_position[begin:end] == 99).sum() == 1, f"row {r} took more or less than one token"


def test_more_rows_than_blocks_in_flight():
    lengths = [(37 * i) % 90 for i in range(1200)]
    state = make_state(lengths, [max(length, 4) + (i % 3) for i, length in enumerate(lengths)], dtype=torch.bfloat16)
    token = make_token(300, 8, 2, 64, position=10**6, dtype=torch.bfloat16)
    checked_step("cuda", state, token, **defaults(pool=7))


@pytest.mark.parametrize("dtype", HALF)
def test_long_rows_of_many_slices(dtype):
    lengths = [5000, 31, 20000, 0, 3, 4097]
    state = make_state(lengths, [length + (i % 2) for i, length in enumerate(lengths)], dtype=dtype)
    token = make_token(2, 12, 3, 64, position=10**6, dtype=dtype)
    checked_step("cuda", state, token, **defaults(pool=7, scale=0.2))


@pytest.mark.parametrize("dtype", HALF)
def test_graph_replay_equals_eager_bit_for_bit(dtype):
    first = make_state([60, 1552, 0, 9], [64, 1552, 30, 9], dtype=dtype).clone("cuda")
    replayed, eager = first.clone("cuda"), first.clone("cuda")
    token = tuple(t.contiguous().cuda() for t in make_token(1, 16, 4, 64, position=9000, dtype=dtype))
    replay, captured = capture_graph(lambda: run(replayed, token, **defaults(pool=7)))
    for name in CHANGED:  # capturing ran a step
        getattr(replayed, name).copy_(getattr(first, name))
    for step in range(20):
        for t in token[:3]:
            t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(step)))
        token[3].add_(1)
        replay()
        out, lse = run(eager, token, **defaults(pool=7))
        assert torch.equal(captured[0], out)
        assert torch.equal(captured[1], lse)
    for name in CHANGED:
        mine, its = getattr(replayed, name), getattr(eager, name)
        assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", HALF)
def test_same_bits_twice(dtype):
    rooms = [3000, 17, 64, 0, 800, 1, 2, 500]
    start = make_state(rooms, rooms, dtype=dtype, key_dim=128).clone("cuda")
    results = []
    for _ in range(2):
        state = start.clone("cuda")
        steps = [
            run(state, make_token(2, 16, 4, 128, position=9000, dtype=dtype), **defaults(window=1)) for _ in range(5)
        ]
        results.append([t for pair in steps for t in pair] + [getattr(state, name) for name in CHANGED])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
