# SPDX-License-Identifier: Apache-2.0
"""decode_evict_: attend, vote, one token in, one out; the worked vectors of the method come first."""

import math

import pytest
import torch
from evict_state import (
    CHANGED,
    assert_step,
    checked_step,
    defaults,
    make_state,
    make_token,
    run,
    vector_state,
    vector_token,
    vote_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same_bits_for_threads, opcheck

from uncomp import ops

HALF = [torch.float32, torch.float16, torch.bfloat16]


# ---- values
@pytest.mark.parametrize("dtype", HALF)
def test_worked_vector_token_5_leaves_then_token_6(device, dtype):
    y = [
        [0.30, 0.05, 0.20, 0.10, 0.08, 0.02, 0.05, 0.15, 0.05],
        [0.20, 0.10, 0.15, 0.12, 0.06, 0.03, 0.02, 0.12, 0.20],
    ]
    first = [0.25, 0.06, 0.18, 0.10, 0.05, 0.01, 0.04, 0.06, 0.10]  # and 0.15 for token 9
    second = [0.22, 0.05, 0.15, 0.12, 0.05, 1.00, 0.04, 0.05, 0.12]  # token 5 is gone by then
    state = vector_state(y, [first, second], dtype, device)
    options = {"window": 2, "sink": 0, "pool": 3, "scale": 1.0}
    run(state, vector_token([0.15, 0.10], 0, 9, dtype), **options)
    assert state.row(0).positions == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # ln a is rounded to the dtype of the keys
    want = torch.tensor(
        [[0.20, 0.10, 0.15, 0.12, 0.06, 0.02, 0.12, 0.20, 0], [0.25, 0.06, 0.18, 0.10, 0.05, 0.04, 0.06, 0.10, 0.15]]
    ).double()
    torch.testing.assert_close(state.row(0).votes, want, rtol=0, atol=tolerance)
    run(state, vector_token([0.10, 0.10], 1, 10, dtype), **options)
    assert state.row(0).positions == [0, 1, 2, 3, 4, 7, 8, 9, 10]
    want = torch.tensor(
        [[0.25, 0.06, 0.18, 0.10, 0.05, 0.06, 0.10, 0.15, 0], [0.22, 0.05, 0.15, 0.12, 0.05, 0.05, 0.12, 0.10, 0.10]]
    ).double()
    torch.testing.assert_close(state.row(0).votes, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", HALF)
def test_worked_vector_tie_goes_to_the_oldest(device, dtype):
    state = vector_state([[0.0] * 5], [[0.2, 0.1, 0.1, 0.1, 0.1]], dtype, device)
    run(state, vector_token([0.4], 0, 5, dtype), window=1, sink=0, pool=3, scale=1.0)
    assert state.row(0).positions == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("batch", "rows", "num_kv_heads", "group"), [(1, 2, 2, 4), (3, 2, 1, 1), (1, 1, 1, 7)])
def test_equals_reference(device, dtype, batch, rows, num_kv_heads, group):
    rooms = [5, 70, 33, 129, 64, 18][: batch * rows]
    lengths = [5, 70, 20, 129, 64, 0][: batch * rows]
    state = make_state(lengths, rooms, dtype=dtype)
    token = make_token(batch, rows * group, num_kv_heads, 64, position=1000, dtype=dtype)
    for step in range(3):
        state = checked_step(device, state, (*token[:3], token[3] + step), **defaults(sink=1)).clone("cpu")


@pytest.mark.parametrize("key_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", HALF)
def test_head_dims(device, dtype, key_dim):
    value_dim = 128 if key_dim == 256 else 64
    state = make_state([130, 40], [130, 50], key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    token = make_token(1, 6, 2, key_dim, value_dim, position=10**6, dtype=dtype)
    checked_step(device, state, token, **defaults())


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 9, 16])
def test_group_sizes(device, group):
    for dtype in HALF:
        state = make_state([70], [70], dtype=dtype)
        checked_step(device, state, make_token(1, group, 1, 64, position=999, dtype=dtype), **defaults())


@pytest.mark.parametrize("pool_mode", ["max", "avg"])
@pytest.mark.parametrize("pool", [1, 3, 7, 129])
@pytest.mark.parametrize("sink", [0, 3])
def test_pools(device, pool_mode, pool, sink):
    state = make_state([150, 12], [150, 12], vote_window=8)
    token = make_token(1, 4, 2, 64, position=9999)
    checked_step(device, state, token, **defaults(pool=pool, pool_mode=pool_mode, sink=sink, window=8))


@pytest.mark.parametrize("reduce_group", ["mean", "max"])
def test_reductions_of_the_group(device, reduce_group):
    state = make_state([40, 41], [40, 41])
    checked_step(device, state, make_token(1, 8, 2, 64, position=999), **defaults(reduce_group=reduce_group, scale=1.0))


def test_sum_is_stored_as_the_mean(device):
    one, other = (make_state([40], [40]).clone(device) for _ in range(2))
    token = make_token(1, 4, 1, 64, position=999)
    run(one, token, **defaults(reduce_group="mean"))
    run(other, token, **defaults(reduce_group="sum"))
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in CHANGED if "rows" not in name)


@pytest.mark.parametrize("vote_window", [1, 3, 8, 64])
def test_ring_turns_round(device, vote_window):
    state = make_state([20], [20], vote_window=vote_window)
    for step in range(5):
        token = make_token(1, 2, 1, 64, position=1000 + step, seed=step)
        state = checked_step(device, state, token, **defaults()).clone("cpu")


def test_a_thousand_steps_keep_the_state_sound(device):
    rooms, window, sink = [9, 24, 4], 3, 1
    state = make_state([9, 5, 0], rooms, key_dim=8, vote_window=3).clone(device)
    sinks = [state.row(r).positions[:sink] for r in range(3)]
    for step in range(1000):
        token = make_token(1, 6, 1, 8, position=500 + step, seed=step)
        run(state, token, window=window, sink=sink, pool=5, scale=1.0, pool_mode="max" if step % 2 else "avg")
        if step % 50 == 49:
            for r in range(3):
                state.assert_sound(r)
                positions = state.row(r).positions
                assert len(positions) == rooms[r]
                assert positions[-window:] == [500 + step - i for i in reversed(range(window))]
                assert positions[:sink] == (sinks[r] or [500])


# ---- edges
def test_room_of_window_plus_sinks_is_a_sliding_window(device):
    state = make_state([6], [6], vote_window=2).clone(device)
    sinks = state.row(0).positions[:2]
    for step in range(8):
        run(state, make_token(1, 2, 1, 64, position=100 + step, seed=step), **defaults(window=4, sink=2))
    assert state.row(0).positions == [*sinks, 104, 105, 106, 107]


def test_row_without_room_gives_zero_and_changes_nothing(device):
    before = make_state([0, 6, 0], [0, 6, 0])
    after = checked_step(device, before, make_token(1, 6, 3, 64, position=77), **defaults())
    assert after.row_len.tolist() == [0, 6, 0]


def test_empty_row_attends_to_the_new_token_alone(device):
    state = make_state([0], [5]).clone(device)
    query, key, value, position = make_token(1, 4, 1, 64, position=3)
    out, lse = run(state, (query, key, value, position), **defaults())
    torch.testing.assert_close(out.cpu(), value.expand(1, 4, 1, 64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.cpu(), 0.125 * (query @ key.transpose(2, 3))[..., 0, 0], rtol=1e-5, atol=1e-5)
    assert state.row(0).positions == [3]
    assert state.vote_sum[0] == 2 ** vote_bits(4)
    assert state.row_len.tolist() == [1]


def test_grows_to_its_room_then_stays(device):
    state = make_state([2], [5]).clone(device)
    for step in range(6):
        run(state, make_token(1, 1, 1, 64, position=50 + step, seed=step), **defaults())
        assert state.row_len.tolist() == [min(3 + step, 5)]
        state.assert_sound(0)


def test_no_sequence(device):
    state = make_state([], []).clone(device)
    out, lse = run(state, make_token(0, 4, 2, 64, position=0), **defaults())
    assert out.shape == (0, 4, 1, 64)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize("dtype", HALF)
def test_nan_stays_in_its_head_and_ends(device, dtype):
    state = make_state([20, 20], [20, 20], dtype=dtype)
    state.key_rows[7, 3] = math.nan
    after = state.clone(device)
    out, lse = run(after, make_token(1, 4, 2, 64, position=999, dtype=dtype), **defaults())
    assert out[:, :2].isnan().all()
    assert lse[:, :2].isnan().all()
    assert out[:, 2:].isfinite().all()
    ring_row = int(state.vote_step[0])
    assert not after.votes[ring_row, :20].any()  # the votes of NaN are 0
    for r in range(2):
        after.assert_sound(r)


def test_nan_in_one_head_of_a_group_takes_the_votes_of_all(device):
    state = make_state([20], [20]).clone(device)
    query, key, value, position = make_token(1, 4, 1, 64, position=999)
    query = query.contiguous()
    query[0, 1] = math.nan
    for mode in ["mean", "max"]:
        after = state.clone(device)
        out, _ = run(after, (query, key, value, position), **defaults(reduce_group=mode))
        assert out.isnan().all(-1).flatten().tolist() == [False, True, False, False]
        assert not after.votes[int(state.vote_step[0]), :20].any()


def test_all_scores_equal_the_oldest_leaves(device):
    state = make_state([12], [12])
    state.key_rows.zero_()
    state.votes.zero_()
    state.vote_sum.zero_()
    state = state.clone(device)
    gone = state.row(0).positions[1]
    query, key, value, position = make_token(1, 2, 1, 64, position=999)
    run(state, (query, torch.zeros_like(key), value, position), **defaults(sink=1))
    assert gone not in state.row(0).positions
    state.assert_sound(0)


def test_state_in_slices_of_larger_tensors(device):
    state = make_state([9, 30], [12, 30])
    whole = {name: torch.cat([getattr(state, name)] * 3) for name in CHANGED if name != "votes"}
    inside = state.clone()
    for name, tensor in whole.items():
        size = getattr(state, name).shape[0]
        setattr(inside, name, tensor.to(device)[size : 2 * size])
    inside.votes, inside.row_start = state.votes.to(device), state.row_start.to(device)
    token = make_token(1, 4, 2, 64, position=999)
    out, lse = run(inside, token, **defaults())
    assert_step(state, inside, token, out, lse, **defaults())


def check_random_call(draw, device):
    batch, num_kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    rows, group = num_kv_heads * draw(st.integers(1, 2)), draw(st.integers(1, 7))
    window, sink, dtype = draw(st.integers(1, 4)), draw(st.integers(0, 2)), draw(st.sampled_from(HALF))
    rooms = draw(
        st.lists(
            st.sampled_from([0, window + sink, window + sink + 1, 13, 40]), min_size=batch * rows, max_size=batch * rows
        )
    )
    lengths = [room if draw(st.booleans()) else room // 2 for room in rooms]
    key_dim, value_dim = draw(st.sampled_from([8, 24, 64])), draw(st.sampled_from([8, 40]))
    seed, vote_window = draw(st.integers(0, 99)), draw(st.integers(1, 9))
    state = make_state(
        lengths, rooms, key_dim=key_dim, value_dim=value_dim, dtype=dtype, vote_window=vote_window, seed=seed
    )
    token = make_token(batch, rows * group, num_kv_heads, key_dim, value_dim, position=10**6, dtype=dtype, seed=seed)
    options = {
        "window": window,
        "sink": sink,
        "pool": draw(st.sampled_from([1, 3, 9])),
        "scale": draw(st.sampled_from([0.0, 0.1, 3.0])),
        "pool_mode": draw(st.sampled_from(["max", "avg"])),
        "reduce_group": draw(st.sampled_from(["mean", "max"])),
    }
    hostile = draw(st.sampled_from([None, None, math.nan, math.inf, -math.inf]))
    if hostile is not None and state.key_rows.shape[0] > 0:
        state.key_rows[draw(st.integers(0, state.key_rows.shape[0] - 1)), 0] = hostile
    wrong, kind = draw(
        st.sampled_from(
            [({}, None)] * 6
            + [({"pool": 2}, ValueError), ({"scale": math.nan}, ValueError), ({"pool": 131}, NotImplementedError)]
        )
    )
    if device == "cpu" and kind is None and any(rooms) and draw(st.integers(0, 7)) == 7:
        wrong, kind = {"window": max(rooms) + 1}, ValueError
    after = state.clone(device)
    if kind is not None:
        with pytest.raises(kind, match="uncomp::decode_evict_"):
            run(after, token, **{**options, **wrong})
        assert all(torch.equal(getattr(state, n), getattr(after, n).cpu()) for n in CHANGED if "rows" not in n)
        return
    out, lse = run(after, token, **options)
    if hostile is None:
        assert_step(state, after, token, out, lse, **options)
    for r in range(len(rooms)):
        after.assert_sound(r)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_calls(data):
    """Any shapes, strides and values: the reference's result, or the right kind of exception and no change."""
    check_random_call(data.draw, "cpu")


@pytest.mark.gpu
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_calls_on_the_device(data):
    check_random_call(data.draw, "cuda")


def test_the_number_of_threads_changes_no_bit():
    before = make_state([2000, 300, 0, 700], [2000, 301, 10, 700], vote_window=4)
    token = make_token(2, 6, 2, 64, position=9999)

    def step():
        after = before.clone("cpu")
        return *run(after, token, **defaults()), *after.arguments()

    assert_same_bits_for_threads(step)


# ---- errors
def changed(token, state, **replace):
    """Positional arguments of the operator with some replaced by name."""
    names = ["query", "key", "value", "position", "row_start", *CHANGED]
    return [replace.get(n, t) for n, t in zip(names, [*token, *state.arguments()], strict=True)]


INT = torch.int32


@pytest.mark.parametrize(
    ("replace", "options", "kind", "text"),
    [
        ({"query": torch.zeros(1, 4, 1, 64).double()}, {}, TypeError, "query must be float32, float16 or bfloat16"),
        ({"query": torch.zeros(1, 4, 2, 64)}, {}, ValueError, "query must hold one token"),
        ({"query": torch.zeros(1, 3, 1, 64)}, {}, ValueError, "query must have a multiple of the 2 rows .* got 3"),
        (
            {"query": torch.zeros(1, 64, 1, 64)},
            {},
            NotImplementedError,
            "at most 16 heads for each row; got 32",
        ),
        ({"query": torch.zeros(1, 4, 1, 60)}, {}, NotImplementedError, "query must have a head dim .* got 60"),
        (
            {"key": torch.zeros(1, 2, 1, 64).half()},
            {},
            TypeError,
            r"key must have the dtype of query .* got float16",
        ),
        (
            {"key": torch.zeros(1, 3, 1, 64)},
            {},
            ValueError,
            r"value must have shape .* = \[1, 3, 1, 64\]",
        ),
        ({"key_rows": torch.zeros(12, 56)}, {}, ValueError, r"key_rows must have shape \[C, Dk\] = \[12, 64\]"),
        ({"key_rows": torch.zeros(64, 12).T}, {}, ValueError, "key_rows must be contiguous"),
        ({"position": torch.zeros(1)}, {}, TypeError, "position must be int32; got float32"),
        ({"row_len": torch.zeros(3, dtype=INT)}, {}, ValueError, r"row_start must have shape \[R \+ 1\] = \[4\]"),
        ({"votes": torch.zeros(0, 12, dtype=INT)}, {}, ValueError, "votes must have at least one ring row"),
        ({"votes": torch.zeros(65, 12, dtype=INT)}, {}, NotImplementedError, "votes must have at most 64 ring rows"),
        (
            {"row_start": torch.tensor([0, 7, 6], dtype=INT)},
            {},
            ValueError,
            "row_start must ascend from 0 or more to at most 12 slots",
        ),
        (
            {"row_start": torch.tensor([0, 6, 13], dtype=INT)},
            {},
            ValueError,
            "row_start must ascend from 0 or more to at most 12 slots",
        ),
        (
            {"row_len": torch.tensor([6, 7], dtype=INT)},
            {},
            ValueError,
            r"row_len must lie in \[0, room\]; got 7 for row 1",
        ),
        ({"order": torch.full((12,), 6, dtype=INT)}, {}, ValueError, r"order must hold every slot 0 .. 5 of row 0"),
        ({"order": torch.zeros(12, dtype=INT)}, {}, ValueError, "once; got 0 at place 1"),
        ({}, {"window": 0}, ValueError, "window must be at least 1; got 0"),
        ({}, {"sink": -1}, ValueError, "sink must not be negative; got -1"),
        ({}, {"window": 4, "sink": 3}, ValueError, r"at least window \+ sink = 7; got 6 at row 0"),
        ({}, {"pool": 4}, ValueError, "pool must be odd and at least 1; got 4"),
        ({}, {"pool": 131}, NotImplementedError, "pool must be at most 129; got 131"),
        ({}, {"scale": math.inf}, ValueError, "scale must be a finite number"),
        ({}, {"scale": 1e39}, ValueError, "scale must be a finite number"),
        ({}, {"pool_mode": "min"}, ValueError, 'pool_mode must be "max" or "avg"; got "min"'),
        ({}, {"reduce_group": "none"}, ValueError, "reduce_group must be"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(replace, options, kind, text):
    state, token = make_state([6, 6], [6, 6], poison=False), make_token(1, 4, 2, 64, position=99)
    before = state.clone()
    with pytest.raises(kind, match="uncomp::decode_evict_: .*" + text):
        ops.decode_evict_(*changed(token, state, **replace), **defaults(**options))
    assert all(torch.equal(getattr(before, name), getattr(state, name)) for name in CHANGED)


def test_unaligned_rows_are_refused():
    state, token = make_state([6, 6], [6, 6]), make_token(1, 4, 2, 64, position=99)
    state.key_rows = torch.zeros(12 * 64 + 1)[1:].view(12, 64)
    with pytest.raises(ValueError, match="key_rows must have rows that start on 16-byte borders"):
        run(state, token, **defaults())


def test_gradients_are_refused():
    state, token = make_state([6, 6], [6, 6]), make_token(1, 4, 2, 64, position=99)
    with pytest.raises(NotImplementedError, match="inference only"):
        run(state, (token[0].detach().requires_grad_(), *token[1:]), **defaults())


# ---- opcheck
def test_opcheck(device):
    state, token = make_state([6, 4], [6, 6], poison=False), make_token(2, 4, 1, 64, position=99)
    arguments = [t.to(device) for t in [*token, *state.arguments()]]
    opcheck("decode_evict_", *arguments, 2, 0, 3, 0.125, "max", "mean")


# ---- compile
def test_compile_fullgraph(device):
    token = tuple(t.contiguous().to(device) for t in make_token(1, 4, 2, 64, position=99))
    one, other = (make_state([6, 4], [6, 6], poison=False).clone(device) for _ in range(2))

    def two_steps(state):
        first, _ = run(state, token, **defaults())
        return first * 2, run(state, token, **defaults())[1]

    got, want = torch.compile(two_steps, fullgraph=True)(one), two_steps(other)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in CHANGED)
