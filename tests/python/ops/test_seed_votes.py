# SPDX-License-Identifier: Apache-2.0
"""seed_votes_: the first decode step must find the votes of the last prompt queries, exact as integers."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.seed_votes import vote_bits, vote_weights
from support import assert_same_bits_for_threads, capture_graph, opcheck

from uncomp import ops
from uncomp.testing import RaggedArena, make_arena

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNTOUCHED = -7


@dataclass
class Call:
    """Arguments of one call; state tensors are poisoned."""

    query: torch.Tensor
    lse: torch.Tensor
    query_position: torch.Tensor
    arena: RaggedArena
    votes: torch.Tensor
    vote_sum: torch.Tensor
    vote_step: torch.Tensor
    order: torch.Tensor
    scale: float = 0.125

    def args(self):
        arena = (self.arena.key_rows, self.arena.slot_position, self.arena.row_start, self.arena.row_len)
        state = (self.votes, self.vote_sum, self.vote_step, self.order)
        return self.query, self.lse, self.query_position, *arena, *state, self.scale

    def run(self, reduce_group="mean"):
        ops.seed_votes_(*self.args(), reduce_group=reduce_group)

    def check(self, reduce_group="mean"):
        """Runs and holds every state tensor to the reference."""
        self.run(reduce_group)
        wanted = self.votes.shape[0]
        weights = vote_weights(self.query, self.lse, self.query_position, self.arena, wanted, self.scale, reduce_group)
        one = 2 ** vote_bits(wanted)
        votes = self.votes.cpu().double() / one
        want = weights.nan_to_num(0).clamp(0, 1)
        starts, lengths = self.arena.row_start.tolist(), self.arena.row_len.tolist()
        inside = torch.zeros(want.shape[1], dtype=torch.bool)
        inside[starts[0] : starts[-1]] = True
        assert bool(((votes - want).abs() <= 2e-5 * (1 + want) + 1 / one)[:, inside].all())
        assert bool((self.votes.cpu()[:, inside][want[:, inside] == 0] <= 1).all())
        assert bool((self.votes[:, (~inside).to(self.votes.device)] == UNTOUCHED).all())
        live = torch.zeros_like(inside)
        order = torch.full_like(inside, UNTOUCHED, dtype=torch.int32)
        for start, end, length in zip(starts, starts[1:], lengths, strict=False):
            live[start : start + length] = True
            order[start:end] = 0
            order[start : start + length] = torch.arange(length, dtype=torch.int32)
        assert torch.equal(self.order.cpu(), order)
        assert bool((self.votes.cpu()[:, inside & ~live] == 0).all())
        assert torch.equal(self.vote_sum.cpu()[inside], self.votes.cpu().sum(0, dtype=torch.int32)[inside])
        assert bool((self.vote_sum.cpu()[~inside] == UNTOUCHED).all())
        assert self.vote_step.tolist() == [0] * len(lengths)


def example(
    device="cpu",
    lengths=(0, 1, 40, 20, 33, 7),
    rooms=(2, 3, 64, 20, 33, 9),
    batch=3,
    group=2,
    window=8,
    vote_window=None,
    dim=64,
    dtype=torch.float32,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)
    arena = make_arena(list(lengths), rooms=list(rooms), key_dim=dim, dtype=dtype, device=device, seed=seed)
    heads, capacity = len(lengths) // batch * group, arena.key_rows.shape[0]
    vote_window = window if vote_window is None else vote_window
    query = torch.randn(batch, window, heads, dim, generator=generator).to(device, dtype).transpose(1, 2)
    newest = torch.randint(window, 4 * max(lengths) + window + 1, (batch, 1), generator=generator)
    query_position = (newest - window + 1 + torch.arange(window)).to(device, torch.int32)
    lse = 1.5 * dim**0.5 * 0.125 + torch.rand(batch, heads, window, generator=generator)
    state = [
        torch.full(shape, UNTOUCHED, dtype=torch.int32, device=device)
        for shape in [(vote_window, capacity), (capacity,), (len(lengths),), (capacity,)]
    ]
    return Call(query, lse.to(device), query_position, arena, *state)


def vector_call(device, rows, positions, query_positions):
    """One row whose softmax weights are the given numbers: identity keys, log weights as queries, lse 0."""
    count = len(positions)
    query = torch.zeros(1, 1, len(rows), 16, device=device)
    query[0, 0, :, :count] = torch.tensor(rows, device=device).clamp_min(1e-30).log()
    arena = RaggedArena(
        torch.eye(count, 16, device=device),
        torch.eye(count, 16, device=device),
        torch.tensor(positions, dtype=torch.int32, device=device),
        torch.tensor([0, count], dtype=torch.int32, device=device),
        torch.tensor([count], dtype=torch.int32, device=device),
    )
    state = [
        torch.full(shape, UNTOUCHED, dtype=torch.int32, device=device)
        for shape in [(len(rows), count), (count,), (1,), (count,)]
    ]
    at = torch.tensor([query_positions], dtype=torch.int32, device=device)
    return Call(query, torch.zeros(1, 1, len(rows), device=device), at, arena, *state, scale=1.0)


# ---- values
def test_worked_vector_of_selection(device):
    kept = [0, 3, 4, 5, 8, 9]
    weights = [[0.20, 0.03, 0.25, 0.10, 0.24, 0.9], [0.15, 0.04, 0.22, 0.08, 0.10, 0.15]]  # 0.9: behind the query
    call = vector_call(device, weights, kept, [8, 9])
    call.check()
    want = torch.tensor([[0.20, 0.03, 0.25, 0.10, 0.24, 0.0], weights[1]], dtype=torch.float64)
    torch.testing.assert_close(call.votes.cpu().double() / 2**29, want, rtol=0, atol=1e-6)


def test_worked_vector_of_decode(device):
    weights = [
        [0.30, 0.05, 0.20, 0.10, 0.08, 0.02, 0.05, 0.15, 0.05],
        [0.20, 0.10, 0.15, 0.12, 0.06, 0.03, 0.02, 0.12, 0.20],
    ]
    call = vector_call(device, weights, list(range(9)), [8, 9])
    call.check()
    torch.testing.assert_close(call.votes.cpu().double() / 2**29, torch.tensor(weights).double(), rtol=0, atol=1e-6)
    assert call.order.tolist() == list(range(9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "vote_window"), [(1, 1), (8, 8), (8, 3), (33, 33), (64, 9)])
def test_windows(device, dtype, window, vote_window):
    example(device, window=window, vote_window=vote_window, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce_group", ["mean", "sum", "max"])
@pytest.mark.parametrize("group", [1, 4, 7, 16])
def test_groups(device, dtype, group, reduce_group):
    example(device, lengths=[9, 30, 4], rooms=[9, 31, 40], group=group, dtype=dtype).check(reduce_group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 80, 96, 128, 256])
def test_head_dims(device, dtype, dim):
    example(device, dim=dim, dtype=dtype).check()


def test_many_queries_in_several_chunks(device):
    example(device, [70], [80], batch=1, group=16, window=64, dim=256, dtype=torch.bfloat16).check("max")


def test_row_borders(device):
    rooms = [127, 128, 129, 1, 513, 0]
    example(device, rooms, rooms, batch=3, window=2, dtype=torch.float16).check()


def test_agrees_with_window_scores(device):
    query = torch.randn(1, 2, 8, 64, device=device)
    key = torch.randn(1, 1, 50, 64, device=device)
    scores, lse = ops.window_scores(query, key, 0.125)
    at = torch.arange(42, 50, dtype=torch.int32, device=device)[None]
    arena = RaggedArena(
        key[0, 0],
        key[0, 0],
        torch.arange(50, dtype=torch.int32, device=device),
        torch.tensor([0, 50], dtype=torch.int32, device=device),
        torch.tensor([50], dtype=torch.int32, device=device),
    )
    state = [torch.empty(shape, dtype=torch.int32, device=device) for shape in [(8, 50), (50,), (1,), (50,)]]
    Call(query, lse, at, arena, *state).check()
    torch.testing.assert_close(state[1] / 2**27, scores[0], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_calls_hold_the_contract(data):
    draw = data.draw
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lengths = [draw(st.integers(0, 30)) for _ in range(batch * rows)]
    rooms = [length + draw(st.integers(0, 9)) for length in lengths]
    window = draw(st.integers(1, 12))
    device = draw(st.sampled_from(["cpu", "cuda"])) if torch.cuda.is_available() else "cpu"
    call = example(
        device,
        lengths,
        rooms,
        batch,
        draw(st.sampled_from([1, 3, 4, 7])),
        window,
        draw(st.integers(1, window)),
        draw(st.sampled_from([8, 24, 64])),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 99)),
    )
    odd = draw(st.sampled_from([None, None, float("nan"), float("inf"), float("-inf"), 300.0]))
    if odd is not None and max(lengths) > 0:
        row = lengths.index(max(lengths))
        call.arena.key_rows[int(call.arena.row_start[row]), 0] = odd
    call.query_position[:, : draw(st.integers(0, window))] = -1
    call.check(draw(st.sampled_from(["mean", "sum", "max"])))


# ---- edges
def test_queries_that_do_not_exist_do_not_vote(device):
    call = example(device)
    call.query_position[:, :5] = -1
    call.query[:, :, :5] = float("nan")
    call.lse[:, :, :5] = float("-inf")
    call.check()
    start, end = int(call.arena.row_start[0]), int(call.arena.row_start[-1])
    assert bool((call.votes[:5, start:end] == 0).all())


def test_nan_votes_nothing_and_weights_above_one_are_one(device):
    call = example(device, [5], [8], batch=1, window=4)
    call.query_position.fill_(2**31 - 1)
    call.arena.key_rows[2, 0] = float("nan")
    call.lse[0, :, 1] = -1e4
    call.run()
    assert bool((call.votes[:, 2] == 0).all())
    assert bool((call.votes[1, [0, 1, 3, 4]] == 2 ** vote_bits(4)).all())


def test_slots_outside_every_row_stay_untouched(device):
    call = example(device, [5, 6], [8, 6], batch=1)
    call.arena.row_start += 0
    call.arena.row_start[-1] -= 2  # the last row gives up room
    call.arena.row_len[1] = 3
    call.check()


def test_no_rows(device):
    call = example(device, [0], [4], batch=1)
    call.check()
    call.query, call.lse, call.query_position = call.query[:0], call.lse[:0], call.query_position[:0]
    call.arena.row_start, call.arena.row_len = call.arena.row_start[:1], call.arena.row_len[:0]
    call.vote_step = call.vote_step[:0]
    call.run()


@pytest.mark.gpu
def test_wild_rows_on_the_device_stay_inside():
    call = example("cuda")
    call.arena.row_start.copy_(torch.tensor([0, 50, 20, -9, 2**31 - 1, 40, 7]))
    call.arena.row_len.copy_(torch.tensor([2**31 - 1, 3, -1, 7, 9, 9]))
    call.run()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_input_same_bits(dtype):
    calls = [example("cuda", [900] * 6, [901] * 6, group=4, dim=128, dtype=dtype) for _ in range(3)]
    for call in calls:
        call.run()
        assert torch.equal(call.votes, calls[0].votes)
        assert torch.equal(call.vote_sum, calls[0].vote_sum)


def test_the_number_of_threads_changes_no_bit():
    call = example(lengths=[900, 0, 1300], rooms=[950, 5, 1300], group=4, dim=128)

    def run():
        call.run()
        return tuple(x.clone() for x in call.args()[7:11])

    assert_same_bits_for_threads(run)


# ---- errors
@pytest.mark.parametrize(
    ("name", "value", "kind", "text"),
    [
        (0, torch.zeros(3, 4, 8, 60), NotImplementedError, "query must have a head dim that is a multiple of 8"),
        (0, torch.zeros(3, 4, 65, 64), NotImplementedError, "at most 64 window queries; got 65"),
        (0, torch.zeros(3, 4, 8, 64).double(), TypeError, "query must be float32, float16 or bfloat16"),
        (1, torch.zeros(3, 4, 8).half(), TypeError, "lse must be float32; got float16"),
        (1, torch.zeros(3, 4, 7), ValueError, r"lse must have shape \[B, Hq, W\] = \[3, 4, 8\]; got \[3, 4, 7\]"),
        (2, torch.zeros(3, 7, dtype=torch.int32), ValueError, r"query_position must have shape \[B, W\]"),
        (2, torch.zeros(3, 8, dtype=torch.int64), TypeError, "query_position must be int32; got int64"),
        (3, torch.zeros(131, 64).half(), TypeError, r"key_rows must have the dtype of query \(float32\); got float16"),
        (3, torch.zeros(131, 32), ValueError, r"key_rows must have the head dim of query \(64\); got 32"),
        (4, torch.zeros(130, dtype=torch.int32), ValueError, r"slot_position must have shape \[C\] = \[131\]"),
        (6, torch.full((6,), 70, dtype=torch.int32), ValueError, r"row_len must lie in \[0, room\]; got 70 for row 0"),
        (6, torch.zeros(5, dtype=torch.int32), ValueError, r"row_start must have shape \[R \+ 1\]"),
        (7, torch.zeros(9, 131, dtype=torch.int32), ValueError, "votes must have 1 to W = 8 rows; got 9"),
        (7, torch.zeros(8, 131), TypeError, "votes must be int32; got float32"),
        (7, torch.zeros(131, 8, dtype=torch.int32).t(), ValueError, "votes must be contiguous"),
        (8, torch.zeros(3, dtype=torch.int32), ValueError, r"vote_sum must have shape \[C\]"),
        (9, torch.zeros(3, dtype=torch.int32), ValueError, r"vote_step must have shape \[R\]"),
        (10, torch.zeros(3, dtype=torch.int32), ValueError, r"order must have shape \[C\]"),
        (11, float("inf"), ValueError, "scale must be a finite number"),
        (11, 1e39, ValueError, "scale must be a finite number"),
    ],
)
def test_errors_name_the_argument(name, value, kind, text):
    call = example()
    args = list(call.args())
    args[name] = value
    with pytest.raises(kind, match="uncomp::seed_votes_: .*" + text):
        ops.seed_votes_(*args)
    assert bool((call.votes == UNTOUCHED).all())
    assert bool((call.vote_step == UNTOUCHED).all())


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match='reduce_group must be "mean", "sum" or "max"; got "none"'):
        example().run("none")


# ---- opcheck
def test_opcheck(device):
    opcheck("seed_votes_", *example(device).args(), "max")


# ---- compile
def test_compile_fullgraph(device):
    call, eager = example(device), example(device)
    eager.run()

    def step(*args):
        ops.seed_votes_(*args)
        return args[7] + 1

    assert torch.equal(torch.compile(step, fullgraph=True)(*call.args()), eager.votes + 1)
    assert torch.equal(call.vote_sum, eager.vote_sum)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_replay_follows_keys_and_lengths(dtype):
    call = example("cuda", dtype=dtype)
    replay, _ = capture_graph(call.run)
    call.arena.row_len.copy_(torch.tensor([2, 0, 33, 3, 1, 9]))
    call.arena.key_rows.copy_(torch.randn(131, 64))
    call.arena.slot_position.copy_(torch.arange(131))
    fresh = Call(call.query, call.lse, call.query_position, call.arena, *[x.clone() for x in call.args()[7:11]])
    fresh.check()
    replay()
    for got, want in zip(call.args()[7:11], fresh.args()[7:11], strict=True):
        assert torch.equal(got, want)
