# SPDX-License-Identifier: Apache-2.0
"""append_kv_: a row takes all its new tokens or none, behind its old ones, and its length moves on once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.append_kv import append_kv as reference
from support import assert_same_bits_for_threads, capture_graph, opcheck, same_bits

import uncomp
from uncomp import ops
from uncomp.testing import make_arena

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def new_tokens(device="cpu", batch=1, heads=2, tokens=3, key_dim=16, value_dim=24, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(batch, heads, tokens, key_dim, generator=generator).to(device, dtype)
    value = torch.randn(batch, heads, tokens, value_dim, generator=generator).to(device, dtype)
    position = torch.randint(0, 2**31 - 1, (batch, tokens), dtype=torch.int32, generator=generator).to(device)
    return key, value, position


def arena(lengths, rooms, device="cpu", key_dim=16, value_dim=24, dtype=torch.float32):
    made = make_arena(lengths, rooms=rooms, key_dim=key_dim, value_dim=value_dim, dtype=dtype, device=device)
    return made.row_start, made.row_len, made.key_rows, made.value_rows, made.slot_position


def lists(state):
    """The rows of an arena as lists of (key, value, position)."""
    row_start, row_len, key_rows, value_rows, slot_position = (t.cpu() for t in state)
    rows = []
    for row, length in enumerate(row_len.tolist()):
        begin = int(row_start[row])
        rows.append([(key_rows[i], value_rows[i], int(slot_position[i])) for i in range(begin, begin + length)])
    return rows


def check(state, rows, before):
    """Rows equal the lists; every slot behind them is as it was."""
    row_start, row_len, key_rows, value_rows, slot_position = (t.cpu() for t in state)
    assert row_len.tolist() == [len(row) for row in rows]
    want = [t.cpu().clone() for t in before[2:]]
    for row, tokens in enumerate(rows):
        for slot, (key, value, position) in enumerate(tokens, int(row_start[row])):
            want[0][slot], want[1][slot], want[2][slot] = key, value, position
    assert same_bits(key_rows, want[0])
    assert same_bits(value_rows, want[1])
    assert same_bits(slot_position, want[2])


def check_equals_reference(new, state, **valid):
    before, rows = [t.clone() for t in state], lists(state)
    reference(rows, *new, **valid)
    assert ops.append_kv_(*new, *state, **valid) is None
    check(state, rows, before)


# ---- values
def test_300_appends_against_a_list(device):
    """One new token a step, now and then several: what a decode loop does."""
    state = arena([0, 3, 1, 0], [330, 333, 331, 340], device)
    before, rows = [t.clone() for t in state], lists(state)
    for step in range(300):
        new = new_tokens(device, 2, 2, 1 if step % 17 else 2, seed=step)
        ops.append_kv_(*new, *state)
        reference(rows, *new)
    check(state, rows, before)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 16, 17, 64, 129, 512])
@pytest.mark.parametrize("width", [8, 128])
def test_token_counts_around_the_work_of_a_warp(device, tokens, width):
    state = arena([0, 7, 2], [tokens, tokens + 7, tokens + 5], device, width, width, torch.bfloat16)
    check_equals_reference(new_tokens(device, 3, 1, tokens, width, width, torch.bfloat16), state)


@pytest.mark.parametrize("group", [1, 4, 7])
def test_rows_per_query_head_repeat_kv_heads(device, group):
    rows = 2 * 2 * group
    state = arena([r % 3 for r in range(rows)], [9] * rows, device)
    check_equals_reference(new_tokens(device, 2, 2, 4), state)


def test_valid_tokens_per_sequence(device):
    """Counts of 0, some and all in one batch; only columns first .. first + length - 1 are new."""
    state = arena([1, 2, 0, 3, 4, 0], [12] * 6, device)
    valid = {"first": int32([4, 1, 0], device), "length": int32([0, 2, 4], device)}
    check_equals_reference(new_tokens(device, 3, 2, 4), state, **valid)
    check_equals_reference(new_tokens(device, 3, 2, 4, seed=1), state, first=int32([3, 4, 2], device))
    check_equals_reference(new_tokens(device, 3, 2, 4, seed=2), state, length=int32([1, 0, 0], device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (3, 8), (80, 96), (256, 5)])
def test_every_width(device, dtype, key_dim, value_dim):
    new = new_tokens(device, 1, 2, 19, key_dim, value_dim, dtype)
    check_equals_reference(new, arena([2, 5], [30, 40], device, key_dim, value_dim, dtype))


def test_strided_sources(device):
    """New tokens come as [B, T, H, D] slices of a fused projection."""
    fused = torch.randn(2, 5, 2, 64, device=device)
    key, value = fused[..., 8:24].transpose(1, 2), fused[..., 40:].transpose(1, 2)
    position = torch.arange(10, dtype=torch.int32, device=device).view(2, 5)
    check_equals_reference((key, value, position), arena([0, 1, 2, 3], [9] * 4, device))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_calls_give_the_contract_or_its_error(data):
    """Either every row has room and takes its tokens, or ValueError and not a byte changed."""
    draw = data.draw
    batch, heads, group, tokens = (draw(st.integers(1, n)) for n in (3, 2, 3, 6))
    key_dim, value_dim, dtype = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.sampled_from(DTYPES))
    key, value, position = new_tokens("cpu", batch, heads, tokens, key_dim, value_dim, dtype)
    key[:, :, ::2] = draw(st.sampled_from([float("nan"), float("inf"), -0.0]))
    rows = batch * heads * group
    lengths = [draw(st.integers(0, 4)) for _ in range(rows)]
    slack = draw(st.sampled_from([0, 6]))
    rooms = [n + slack + draw(st.integers(0, 6)) for n in lengths]
    state = arena(lengths, rooms, "cpu", key_dim, value_dim, dtype)
    first = int32([draw(st.integers(0, tokens)) for _ in range(batch)])
    length = int32([draw(st.integers(0, tokens - f)) for f in first.tolist()])
    counts = length.repeat_interleave(rows // batch).tolist()
    fits = all(n + c <= room for n, c, room in zip(lengths, counts, rooms, strict=True))
    if draw(st.booleans()):
        state[1][draw(st.integers(0, rows - 1))] = draw(st.sampled_from([-1, 1000]))
        fits = False
    if fits:
        check_equals_reference((key, value, position), state, first=first, length=length)
    else:
        before = [t.clone() for t in state]
        with pytest.raises(ValueError, match="uncomp::append_kv_: row_len"):
            ops.append_kv_(key, value, position, *state, first=first, length=length)
        assert all(same_bits(a, b) for a, b in zip(state, before, strict=True))


# ---- edges
def test_no_new_tokens(device):
    check_equals_reference(new_tokens(device, 1, 2, 0), arena([1, 2], [3, 3], device))


def test_no_sequences(device):
    check_equals_reference(new_tokens(device, 0, 2, 3), arena([], [], device))


def test_the_last_free_slot(device):
    state = arena([4, 0], [5, 1], device)
    check_equals_reference(new_tokens(device, 1, 2, 1), state)
    assert state[1].tolist() == [5, 1]


def test_rows_outside_the_layout_are_left_alone(device):
    """An arena may have slots before the first and behind the last row."""
    state = list(arena([2, 0, 0], [6, 6, 6], device))
    state[0], state[1] = int32([3, 8, 15], device), int32([0, 2], device)
    check_equals_reference(new_tokens(device, 1, 2, 4), state)


def test_nan_and_inf_are_copied(device):
    key, value, position = new_tokens(device, 1, 2, 3)
    key[:, 0], value[:, 1] = float("nan"), float("-inf")
    check_equals_reference((key, value, position), arena([1, 1], [9, 9], device))


def test_many_rows(device):
    rows = 2 * 8 * 16
    state = arena([r % 5 for r in range(rows)], [r % 5 + 12 for r in range(rows)], device, 8, 8)
    check_equals_reference(new_tokens(device, 16, 8, 1, 8, 8), state)
    check_equals_reference(new_tokens(device, 16, 8, 11, 8, 8, seed=1), state)


# ---- errors
def good():
    key, value, position = new_tokens()
    row_start, row_len, key_rows, value_rows, slot_position = arena([1, 2], [6, 6])
    return {
        "key": key,
        "value": value,
        "position": position,
        "row_start": row_start,
        "row_len": row_len,
        "key_rows": key_rows,
        "value_rows": value_rows,
        "slot_position": slot_position,
    }


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"key": torch.zeros(1, 2, 3, 16).int()}, TypeError, "key must be float32, float16 or bfloat16; got int32"),
        (
            {"value": torch.zeros(1, 2, 3, 24).half()},
            TypeError,
            r"value must have the dtype of key \(float32\); got float16",
        ),
        ({"value": torch.zeros(1, 1, 3, 24)}, ValueError, "value must have the sizes of key but for the last"),
        ({"key": torch.zeros(1, 3, 16)}, ValueError, r"key must have shape \[B, Hkv, T, D\]"),
        ({"key": torch.zeros(1, 2, 16, 3).mT}, ValueError, "key must be contiguous in its last dimension"),
        ({"position": torch.zeros(1, 3)}, TypeError, "position must be int32; got float32"),
        ({"position": int32([[1, 2]])}, ValueError, r"position must have shape \[B, T\] = \[1, 3\]; got \[1, 2\]"),
        ({"row_start": int32([0, 6])}, ValueError, "row_start must have a multiple of B . Hkv = 2 rows; got 1"),
        ({"row_len": int32([1])}, ValueError, r"row_len must have shape \[R\] = \[2\]; got \[1\]"),
        ({"key_rows": torch.zeros(12, 8)}, ValueError, "key_rows must have 16 channels like key; got 8"),
        ({"key_rows": torch.zeros(16, 12).mT}, ValueError, "key_rows must be contiguous"),
        ({"value_rows": torch.zeros(12, 24).half()}, TypeError, "value_rows must have the dtype of value"),
        ({"value_rows": torch.zeros(11, 24)}, ValueError, "value_rows must have 12 slots like key_rows; got 11"),
        ({"slot_position": int32([0])}, ValueError, r"slot_position must have shape \[C\] = \[12\]; got \[1\]"),
        ({"first": int32([4])}, ValueError, r"first must lie in \[0, 3\]; got 4 for sequence 0"),
        ({"length": int32([4])}, ValueError, r"first \+ length must lie in \[0, 3\]; got 0 \+ 4 for sequence 0"),
        ({"length": int32([-1])}, ValueError, r"first \+ length must lie in"),
        (
            {"row_start": int32([0, 7, 6])},
            ValueError,
            "row_start must ascend from 0 or more to at most 12; got 7 and 6",
        ),
        ({"row_len": int32([1, 7])}, ValueError, r"row_len must lie in \[0, room\]; got 7 for row 1 with room 6"),
        ({"row_len": int32([1, 4])}, ValueError, "row 1 has 4 of 6 slots taken and gets 3 more"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(changes, kind, text):
    arguments = {**good(), **changes}
    before = {name: t.clone() for name, t in arguments.items()}
    with pytest.raises(kind, match="uncomp::append_kv_: .*" + text):
        ops.append_kv_(**arguments)
    assert all(same_bits(arguments[name], t) for name, t in before.items())


def test_gradients_are_refused():
    with pytest.raises(NotImplementedError, match="inference only"):
        ops.append_kv_(**{**good(), "key": torch.zeros(1, 2, 3, 16, requires_grad=True)})


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 40])
def test_overflow_on_the_device_leaves_every_byte_of_that_row(tokens):
    """The full row keeps its bytes and length, its neighbour takes the tokens, and the host hears of it."""
    state = arena([tokens, 1], [2 * tokens - 1, tokens + 1], "cuda")
    before, rows = [t.clone() for t in state], lists(state)
    new = new_tokens("cuda", 1, 2, tokens)
    alone = list(rows[0])
    reference(rows, *new)
    rows[0] = alone
    ops.append_kv_(*new, *state)
    check(state, rows, before)
    with pytest.raises(ValueError, match=r"uncomp::append_kv_: row_len \+ new tokens must fit into the row"):
        uncomp.raise_device_errors()


@pytest.mark.gpu
def test_hostile_layouts_on_the_device_stay_inside():
    """No number in the layout makes the kernel leave its tensors; whatever it notes is cleared here."""
    hostile = [-(2**31), -1, 0, 3, 7, 2**31 - 1]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        row_start, row_len, first, length = (
            int32([hostile[int(i)] for i in torch.randint(0, 6, (n,), generator=generator)], "cuda")
            for n in (3, 2, 1, 1)
        )
        _, _, key_rows, value_rows, slot_position = arena([2, 2], [6, 6], "cuda")
        new = new_tokens("cuda", 1, 2, 3)
        ops.append_kv_(*new, row_start, row_len, key_rows, value_rows, slot_position, first=first, length=length)
    torch.cuda.synchronize()
    try:
        uncomp.raise_device_errors()
    except ValueError as error:
        assert "uncomp::append_kv_" in str(error)


def shared_memory_call():
    row, none = torch.tensor([0, 4], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    new, now = torch.ones(1, 1, 1, 8), torch.zeros(1, 1, dtype=torch.int32)
    return (new, new, now, row, none), torch.zeros(4, 8), torch.zeros(4, dtype=torch.int32)


def test_written_tensors_may_not_share_memory():
    args, rows, slots = shared_memory_call()
    with pytest.raises(ValueError, match="uncomp::append_kv_: value_rows must not share memory with key_rows"):
        ops.append_kv_(*args, rows, rows, slots)
    assert not rows.any()


def test_negated_views_are_refused():
    args, rows, slots = shared_memory_call()
    with pytest.raises(ValueError, match="uncomp::append_kv_: a tensor is a lazily negated view"):
        ops.append_kv_(*args, torch._neg_view(rows), rows.clone(), slots)


# ---- opcheck
def test_opcheck(device):
    new, state = new_tokens(device, 1, 2, 3), arena([1, 2], [9, 9], device)
    for t in state[2:4]:
        t.nan_to_num_()  # opcheck compares with plain equality
    opcheck("append_kv_", *new, None, int32([2], device), *state)


# ---- compile
def test_compile_fullgraph(device):
    state = arena([1, 2], [20, 20], device)
    before, rows = [t.clone() for t in state], lists(state)
    new = new_tokens(device, 1, 2, 3)

    @torch.compile(fullgraph=True)
    def step(key, value, position, row_start, row_len, key_rows, value_rows, slot_position):
        ops.append_kv_(key, value, position, row_start, row_len, key_rows, value_rows, slot_position)
        return row_len + 1

    assert step(*new, *state).tolist() == [5, 6]
    reference(rows, *new)
    check(state, rows, before)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 30])
def test_300_replays_of_one_graph(tokens):
    """Row lengths live on the device, so one captured graph appends at a new place in every replay."""
    state = arena([0, 2], [310 * tokens, 320 * tokens], "cuda")
    before = [t.clone() for t in state]
    new = new_tokens("cuda", 1, 2, tokens)
    replay, _ = capture_graph(lambda: ops.append_kv_(*new, *state))
    for t, old in zip(state, before, strict=True):
        t.copy_(old)
    rows = lists(state)
    for step in range(300):
        for t, fresh in zip(new, new_tokens("cuda", 1, 2, tokens, seed=step), strict=True):
            t.copy_(fresh)
        replay()
        reference(rows, *new_tokens("cpu", 1, 2, tokens, seed=step))
    check(state, rows, before)


def test_the_number_of_threads_changes_no_bit():
    new, state = new_tokens(tokens=700, key_dim=64, value_dim=48), arena([5, 0], [800, 700], key_dim=64, value_dim=48)

    def append():
        after = [t.clone() for t in state]
        ops.append_kv_(*new, *after)
        return tuple(after)

    assert_same_bits_for_threads(append)


@pytest.mark.gpu
def test_same_bits_twice():
    results = []
    for _ in range(2):
        state = arena([5] * 16, [600] * 16, "cuda", 128, 128, torch.bfloat16)
        ops.append_kv_(*new_tokens("cuda", 2, 8, 512, 128, 128, torch.bfloat16), *state)
        results.append(state)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
