# SPDX-License-Identifier: Apache-2.0
"""compact_kv: kept tokens move bit for bit, whatever the layout, and nothing else is promised."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.compact_kv import compact_kv as reference
from support import assert_same_bits_for_threads, capture_graph, opcheck, same_bits

import uncomp
from uncomp import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def starts(lengths, device="cpu"):
    return int32([0, *itertools.accumulate(lengths)], device)


def dense(device="cpu", batch=2, heads=2, tokens=13, key_dim=16, value_dim=24, dtype=torch.bfloat16):
    key = torch.randn(batch, heads, tokens, key_dim).to(device, dtype)
    value = torch.randn(batch, heads, tokens, value_dim).to(device, dtype)
    return key, value


def choice(limits, lengths, device="cpu"):
    """Random distinct tokens of each row, below its limit, and where they begin."""
    index = [torch.randperm(n)[:k].sort().values for n, k in zip(limits, lengths, strict=True)]
    return torch.cat(index).to(device, torch.int32) if index else int32([], device), starts(lengths, device)


def check(got, want, row_start):
    """Live slots are equal to the reference's rows, lengths too."""
    key_rows, value_rows, slot_position, row_len = got
    assert row_len.tolist() == [len(row[0]) for row in want]
    for row, (keys, values, positions) in enumerate(want):
        begin = int(row_start[row])
        end = begin + len(keys)
        assert slot_position[begin:end].tolist() == positions, f"row {row}"
        if keys:
            assert same_bits(key_rows[begin:end], torch.stack(keys)), f"row {row}"
            assert same_bits(value_rows[begin:end], torch.stack(values)), f"row {row}"


def check_equals_reference(key, value, index, index_start, row_start, capacity, **options):
    got = ops.compact_kv(key, value, index, index_start, row_start, capacity, **options)
    assert got[0].shape == (capacity, key.shape[-1])
    assert got[1].shape == (capacity, value.shape[-1])
    check(got, reference(key, value, index, index_start, row_start, capacity, **options), row_start)


# ---- values
def test_kept_tokens_of_the_worked_vector(device):
    """docs/method.md "Selection": tokens 0 3 4 5 8 9 of ten stay, in that order."""
    key = torch.arange(10.0, device=device).view(1, 1, 10, 1).expand(1, 1, 10, 4).contiguous()
    out = ops.compact_kv(key, -key, int32([0, 3, 4, 5, 8, 9], device), starts([6], device), starts([6], device), 6)
    assert out[0][:, 0].tolist() == [0, 3, 4, 5, 8, 9]
    assert out[1][:, 3].tolist() == [0, -3, -4, -5, -8, -9]
    assert out[2].tolist() == [0, 3, 4, 5, 8, 9]
    assert out[3].tolist() == [6]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_rows_per_query_head_repeat_kv_heads(device, batch, group):
    key, value = dense(device, batch)
    rows = batch * 2 * group
    lengths = [(5 * r + 1) % 14 for r in range(rows)]
    index, index_start = choice([13] * rows, lengths, device)
    position = torch.randint(0, 1000, (batch, 13), dtype=torch.int32, device=device)
    row_start = starts([n + r % 3 for r, n in enumerate(lengths)], device)
    check_equals_reference(key, value, index, index_start, row_start, int(row_start[-1]) + 2, position=position)


@pytest.mark.parametrize("with_position", [False, True])
def test_left_padding_is_a_view(device, with_position):
    key, value = dense(device, 3)
    first = int32([0, 5, 13], device)
    lengths = [13, 4, 3, 8, 0, 0]
    index, index_start = choice([13, 13, 8, 8, 0, 0], lengths, device)
    position = torch.randint(0, 99, (3, 13), dtype=torch.int32, device=device) if with_position else None
    row_start = starts(lengths, device)
    check_equals_reference(key, value, index, index_start, row_start, 28, position=position, first=first)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_stride_order(device, order):
    """transformers' keys lie as [B, S, H, D]; every order of the outer dimensions is read in place."""
    sizes = [2, 2, 13]
    made = [torch.randn(*[sizes[d] for d in order], 40).to(device, torch.float16) for _ in range(2)]
    back = [order.index(d) for d in range(3)]
    key, value = (t.permute(*back, 3)[..., 8 * i : 8 * i + 16] for i, t in enumerate(made))
    index, index_start = choice([13] * 4, [3, 13, 0, 6], device)
    row_start = starts([4, 13, 0, 8], device)
    check_equals_reference(key, value, index, index_start, row_start, 25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (3, 8), (64, 80), (96, 7), (128, 128), (256, 320)])
def test_every_width(device, dtype, key_dim, value_dim):
    key, value = dense(device, 1, 2, 70, key_dim, value_dim, dtype)
    index, index_start = choice([70, 70], [65, 9], device)
    check_equals_reference(key, value, index, index_start, starts([65, 9], device), 74)


def test_an_arena_is_packed_again(device):
    key, value = torch.randn(30, 16, device=device), torch.randn(30, 8, device=device)
    source_start, position = int32([0, 12, 12, 20, 29], device), torch.randint(0, 999, (30,), dtype=torch.int32)
    index, index_start = choice([12, 0, 8, 9], [12, 0, 3, 5], device)
    row_start = int32([1, 15, 15, 18, 24], device)
    options = {"position": position.to(device), "source_start": source_start}
    check_equals_reference(key, value, index, index_start, row_start, 26, **options)


def test_repeated_and_unordered_indices(device):
    key, value = dense(device, 1, 1)
    check_equals_reference(key, value, int32([4, 4, 0, 12, 4], device), starts([5], device), starts([5], device), 5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_calls_give_the_contract_or_its_error(data):
    """Any layout numbers: either every one is in order and the result is the reference's, or ValueError."""
    draw = data.draw
    batch, heads, group, tokens = (draw(st.integers(1, n)) for n in (3, 2, 3, 9))
    key_dim, value_dim, dtype = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.sampled_from(DTYPES))
    key, value = dense("cpu", batch, heads, tokens, key_dim, value_dim, dtype)
    key[draw(st.integers(0, batch - 1)), :, ::2] = draw(st.sampled_from([float("nan"), float("inf"), -0.0]))
    rows = batch * heads * group
    lengths = [draw(st.integers(0, tokens)) for _ in range(rows)]
    index, index_start = choice([tokens] * rows, lengths)
    row_start = starts([n + draw(st.integers(0, 2)) for n in lengths])
    capacity = int(row_start[-1]) + draw(st.integers(0, 3))
    broken = draw(st.sampled_from(["nothing", "index", "index_start", "row_start", "capacity"]))
    if broken == "capacity":
        capacity = draw(st.integers(0, capacity))
    elif broken != "nothing":
        wrong = {"index": index, "index_start": index_start, "row_start": row_start}[broken]
        if wrong.numel():
            wrong[draw(st.integers(0, wrong.numel() - 1))] = draw(st.integers(-2, 2 * tokens))
    kept, room = index_start.diff(), row_start.diff()
    fine = (
        bool((kept >= 0).all() and (room >= kept).all())
        and min(int(index_start[0]), int(row_start[0])) >= 0
        and int(index_start[-1]) <= index.numel()
        and int(row_start[-1]) <= capacity
    )
    used = index[int(index_start[0]) : int(index_start[-1])] if fine else index
    if fine and bool(((used >= 0) & (used < tokens)).all()):
        check_equals_reference(key, value, index, index_start, row_start, capacity)
    else:
        with pytest.raises(ValueError, match="uncomp::compact_kv: "):
            ops.compact_kv(key, value, index, index_start, row_start, capacity)


# ---- edges
def test_nothing_is_kept(device):
    key, value = dense(device)
    out = ops.compact_kv(key, value, int32([], device), starts([0] * 4, device), starts([3] * 4, device), 12)
    assert out[3].tolist() == [0, 0, 0, 0]
    assert out[0].shape == (12, 16)


def test_no_sequences(device):
    key, value = dense(device, 0)
    out = ops.compact_kv(key, value, int32([], device), starts([], device), starts([], device), 0)
    assert [tuple(t.shape) for t in out] == [(0, 16), (0, 24), (0,), (0,)]


def test_a_prompt_without_tokens(device):
    key, value = dense(device, 1, 2, 0)
    out = ops.compact_kv(key, value, int32([], device), starts([0, 0], device), starts([1, 1], device), 2)
    assert out[3].tolist() == [0, 0]


def test_entries_outside_all_rows_are_not_read(device):
    key, value = dense(device, 1, 2)
    index = int32([-7, 2, 5, 12, 2**31 - 1], device)
    check_equals_reference(key, value, index, int32([1, 2, 4], device), int32([2, 4, 7], device), 9)


def test_nan_payloads_survive(device):
    bits = torch.tensor([0x7FC1, 0x7F81, 0xFFFF, 0x8000, 0x0001] * 3, dtype=torch.int32).to(torch.int16)
    key = bits.view(torch.bfloat16).view(1, 1, 3, 5).to(device)
    check_equals_reference(key, key, int32([2, 0], device), starts([2], device), starts([2], device), 2)


def test_one_huge_row_among_empty_ones(device):
    key, value = dense(device, 1, 8, 600)
    lengths = [0, 0, 600, 0, 1, 0, 0, 2]
    index, index_start = choice([600] * 8, lengths, device)
    check_equals_reference(key, value, index, index_start, starts(lengths, device), 603)


def test_offsets_beyond_two_to_the_31(device):
    """The last tokens of a source and the last slots of an arena lie more than 2^31 elements from the start."""
    tokens, dim = 2**23, 264
    try:
        key = torch.empty(1, 1, tokens, dim, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("not enough memory for a tensor of 4.4 GB")
    key[:, :, -2:] = torch.randn(2, dim).to(device, torch.float16)
    value, index = key[..., :8], int32([tokens - 1, tokens - 2], device)
    got = ops.compact_kv(key, value, index, starts([2], device), int32([tokens - 2, tokens], device), tokens)
    assert same_bits(got[0][-2:], key[0, 0, -2:].flip(0))
    assert same_bits(got[1][-2:], value[0, 0, -2:].flip(0))
    assert got[2][-2:].tolist() == [tokens - 1, tokens - 2]


# ---- errors
GOOD = {
    "key": torch.zeros(1, 2, 5, 8),
    "value": torch.zeros(1, 2, 5, 8),
    "index": int32([0, 1, 4]),
    "index_start": int32([0, 1, 3]),
    "row_start": int32([0, 2, 4]),
    "capacity": 4,
}
ARENA = {**GOOD, "key": torch.zeros(9, 8), "value": torch.zeros(9, 8), "source_start": int32([0, 4, 9])}


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"key": torch.zeros(1, 2, 5, 8).double()}, TypeError, "key must be float32, float16 or bfloat16; got float64"),
        (
            {"value": torch.zeros(1, 2, 5, 8).half()},
            TypeError,
            r"value must have the dtype of key \(float32\); got float16",
        ),
        ({"value": torch.zeros(1, 2, 4, 8)}, ValueError, "value must have the sizes of key but for the last"),
        ({"key": torch.zeros(2, 5, 8)}, ValueError, r"key must have shape \[B, Hkv, S, D\] where source_start is not"),
        ({"key": torch.zeros(1, 2, 8, 5).mT}, ValueError, "key must be contiguous in its last dimension"),
        ({"value": torch.zeros(1, 2, 5, 0)}, ValueError, "value must have at least one channel"),
        ({"index": torch.zeros(3)}, TypeError, "index must be int32; got float32"),
        ({"index_start": int32([0, 3])}, ValueError, r"index_start must have shape \[R \+ 1\] = \[3\]; got \[2\]"),
        ({"row_start": int32([])}, ValueError, r"row_start must have shape \[R \+ 1\]; got \[0\]"),
        ({"row_start": int32([0, 1, 2, 4]), "index_start": int32([0, 1, 2, 3])}, ValueError, "B . Hkv = 2 rows; got 3"),
        (
            {"position": torch.zeros(1, 4, dtype=torch.int32)},
            ValueError,
            r"position must have shape \[B, S\] = \[1, 5\]",
        ),
        ({"first": int32([0, 0])}, ValueError, r"first must have shape \[B\] = \[1\]; got \[2\]"),
        ({"capacity": -1}, ValueError, "capacity must not be negative; got -1"),
        ({"capacity": 2**31}, NotImplementedError, "capacity must be below 2.31; got 2147483648"),
        ({"capacity": 3}, ValueError, "row_start must ascend from 0 or more to at most 3; got 2 and 4 for row 1"),
        ({"row_start": int32([2, 0, 4])}, ValueError, "row_start must ascend"),
        ({"index_start": int32([0, 2, 4])}, ValueError, "index_start must ascend from 0 or more to at most 3"),
        ({"first": int32([6])}, ValueError, r"first must lie in \[0, 5\]; got 6 for sequence 0"),
        ({"first": int32([1])}, ValueError, r"index must lie in \[0, 4\); got 4 for row 1"),
        ({"index": int32([0, -1, 4])}, ValueError, r"index must lie in \[0, 5\); got -1 for row 1"),
        ({"row_start": int32([0, 3, 4])}, ValueError, "row 1 keeps 2 and has room for 1"),
    ],
)
def test_errors_name_the_argument(changes, kind, text):
    with pytest.raises(kind, match="uncomp::compact_kv: .*" + text):
        ops.compact_kv(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({}, ValueError, "position must be given where key is an arena"),
        ({"position": torch.zeros(8, dtype=torch.int32)}, ValueError, r"position must have shape \[C0\] = \[9\]"),
        ({"position": torch.zeros(9, dtype=torch.int32), "first": int32([0])}, ValueError, "first must be None"),
        ({"key": GOOD["key"]}, ValueError, r"key must have shape \[C0, D\] where source_start is given"),
        (
            {"position": torch.zeros(9, dtype=torch.int32), "source_start": int32([0, 4, 10])},
            ValueError,
            "source_start must ascend from 0 or more to at most 9; got 4 and 10 for row 1",
        ),
        (
            {"position": torch.zeros(9, dtype=torch.int32), "source_start": int32([0, 4, 8])},
            ValueError,
            r"index must lie in \[0, 4\); got 4 for row 1",
        ),
    ],
)
def test_arena_errors_name_the_argument(changes, kind, text):
    with pytest.raises(kind, match="uncomp::compact_kv: .*" + text):
        ops.compact_kv(**{**ARENA, **changes})


def test_a_negative_size_is_refused_on_meta():
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in GOOD.items()}
    with pytest.raises(ValueError, match=r"^uncomp::compact_kv: capacity must not be negative; got -1$"):
        ops.compact_kv(**{**on_meta, "capacity": -1})


def test_gradients_are_refused():
    with pytest.raises(NotImplementedError, match="inference only"):
        ops.compact_kv(**{**GOOD, "key": torch.zeros(1, 2, 5, 8, requires_grad=True)})


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [-1, -2, 13, 2**31 - 1, -(2**31)])
def test_index_outside_on_the_device_is_zero_and_reported(bad):
    key, value = dense("cuda", 1, 1)
    out = ops.compact_kv(key, value, int32([3, bad, 5], "cuda"), starts([3], "cuda"), starts([3], "cuda"), 3)
    assert same_bits(out[0][::2], key[0, 0, [3, 5]])
    assert not out[0][1].any()
    assert not out[1][1].any()
    assert out[2].tolist() == [3, -1, 5]
    with pytest.raises(ValueError, match="uncomp::compact_kv: index must lie inside the source row"):
        uncomp.raise_device_errors()


@pytest.mark.gpu
def test_a_row_without_room_on_the_device_is_cut_and_reported():
    key, value = dense("cuda", 1, 2)
    index, index_start = int32([0, 2, 4, 6, 8], "cuda"), starts([3, 2], "cuda")
    out = ops.compact_kv(key, value, index, index_start, int32([0, 2, 4], "cuda"), 4)
    assert out[3].tolist() == [2, 2]
    assert out[2].tolist() == [0, 2, 6, 8]
    with pytest.raises(ValueError, match="uncomp::compact_kv: kept tokens must fit into the row"):
        uncomp.raise_device_errors()


@pytest.mark.gpu
def test_hostile_layouts_on_the_device_stay_inside():
    """No number in the layout makes the kernel leave its tensors; whatever it notes is cleared here."""
    key, value = dense("cuda", 2, 2)
    hostile = [-(2**31), -1, 0, 3, 7, 2**31 - 1]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        index, index_start, row_start = (
            int32([hostile[int(i)] for i in torch.randint(0, 6, (n,), generator=generator)], "cuda") for n in (9, 5, 5)
        )
        row_len = ops.compact_kv(key, value, index, index_start, row_start, 8)[3]
        assert bool(((row_len >= 0) & (row_len <= 8)).all())
    torch.cuda.synchronize()
    try:
        uncomp.raise_device_errors()
    except ValueError as error:
        assert "uncomp::compact_kv" in str(error)


# ---- opcheck
def test_opcheck(device):
    key, value = dense(device)
    index, index_start = choice([13] * 4, [3, 13, 0, 6], device)
    position = torch.randint(0, 99, (2, 13), dtype=torch.int32, device=device)
    # Slots behind row_len hold anything, so the rows have exactly the room they need.
    arguments = (key, value, position, None, None, index, index_start, index_start, 22)
    opcheck("compact_kv", *arguments)


# ---- compile
def test_compile_fullgraph(device):
    key, value = dense(device)
    index, index_start = choice([13] * 4, [3, 13, 0, 6], device)

    def step(key, value):
        return ops.compact_kv(key * 2, value, index, index_start, index_start, 22)

    for got, want in zip(torch.compile(step, fullgraph=True)(key, value), step(key, value), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_graph_replay_follows_the_layout():
    key, value = dense("cuda")
    index, index_start = choice([13] * 4, [3, 13, 0, 6], "cuda")
    row_start = starts([13] * 4, "cuda")
    replay, out = capture_graph(lambda: ops.compact_kv(key, value, index, index_start, row_start, 52))
    index.copy_(index.flip(0))
    index_start.copy_(starts([0, 1, 13, 8], "cuda"))
    replay()
    check(out, reference(key, value, index, index_start, row_start, 52), row_start)


def test_the_number_of_threads_changes_no_bit():
    key, value = dense("cpu", 1, 3, 1500, 64, 48)
    index, index_start = choice([1500] * 3, [1500, 0, 700])
    assert_same_bits_for_threads(lambda: ops.compact_kv(key, value, index, index_start, index_start, len(index)))


@pytest.mark.gpu
def test_same_bits_twice():
    key, value = dense("cuda", 2, 8, 5000, 128, 128)
    index, index_start = choice([5000] * 16, [997 + 31 * r for r in range(16)], "cuda")
    once, twice = (ops.compact_kv(key, value, index, index_start, index_start, int(index_start[-1])) for _ in "12")
    assert all(same_bits(a, b) for a, b in zip(once, twice, strict=True))
