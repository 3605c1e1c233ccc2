# SPDX-License-Identifier: Apache-2.0
"""Operators that write refuse every argument that shares memory with what they write, before they write anything."""

import itertools

import pytest
import torch
from evict_state import make_state
from key_transform_support import evict_example
from test_seed_votes import example as seed_example

import uncomp  # noqa: F401  registers torch.ops.uncomp

OPS = ("append_kv_", "decode_evict_", "seed_votes_")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def call(op):
    """Every argument of a valid call by its name in the schema, with all optional tensors."""
    if op == "seed_votes_":
        values = seed_example().args()
    elif op == "append_kv_":
        state = make_state([1, 2, 3, 0], [6, 6, 6, 6], key_dim=16)
        arena = (state.row_start, state.row_len, state.key_rows, state.value_rows, state.slot_position)
        new = torch.zeros(2, 2, 3, 16), torch.ones(2, 2, 3, 16), torch.zeros(2, 3, dtype=torch.int32)
        values = (*new, int32(0, 1), int32(3, 2), *arena)
    else:
        state, token, made, _, _ = evict_example(torch.float32, offset=2, bias=True, norm=True)
        options = (2, 0, 3, 0.125, "max", "mean")
        transform = (made.basis, made.bias, made.norm, made.norm_eps, made.frequency, made.rotary_scale, made.offset)
        values = (*token, *state.arguments(), *options, *transform)
    return dict(zip(names(op), values, strict=False))


def schema(op):
    return getattr(torch.ops.uncomp, op).default._schema


def names(op):
    return [argument.name for argument in schema(op).arguments]


def pairs():
    """(operator, one that it writes, another of its tensors), each pair once."""
    for op in OPS:
        arguments = [a for a in schema(op).arguments if "Tensor" in str(a.type)]
        written = {a.name for a in arguments if a.alias_info is not None}
        for a, b in itertools.combinations([a.name for a in arguments], 2):
            if a in written or b in written:
                yield op, a, b


@pytest.mark.parametrize(("op", "one", "other"), list(pairs()))
def test_shared_memory_is_refused(op, one, other):
    given = call(op)
    storage = torch.zeros(max(given[one].nbytes, given[other].nbytes), dtype=torch.uint8)
    for name in (one, other):
        t = given[name]
        given[name] = storage[: t.nbytes].view(t.dtype).view(t.shape)
    before = {name: t.clone() for name, t in given.items() if isinstance(t, torch.Tensor)}
    pair = f"({one} must not share memory with {other}|{other} must not share memory with {one})"
    with pytest.raises(ValueError, match=f"^uncomp::{op}: {pair}; both are one storage"):
        getattr(torch.ops.uncomp, op)(**given)
    assert all(torch.equal(t.nan_to_num(), given[name].nan_to_num()) for name, t in before.items())


@pytest.mark.parametrize("op", OPS)
def test_the_calls_above_work_with_their_own_memory(op):
    getattr(torch.ops.uncomp, op)(**call(op))


def test_a_strided_key_between_whose_elements_the_arena_begins_is_refused():
    given = call("append_kv_")
    rows = given["key_rows"]
    storage = torch.zeros(rows.numel() + 2 * 2 * 3 * 16)
    given["key_rows"] = storage[: rows.numel()].view_as(rows)
    given["key"] = storage[rows.numel() - 16 :][: 2 * 2 * 3 * 16].view(2, 3, 2, 16).transpose(1, 2)
    with pytest.raises(ValueError, match="key must not share memory with key_rows"):
        torch.ops.uncomp.append_kv_(**given)
    given["key"] = storage[rows.numel() :].view(2, 3, 2, 16).transpose(1, 2)
    torch.ops.uncomp.append_kv_(**given)


def test_what_is_only_read_may_share_memory():
    given = call("append_kv_")
    given["value"] = given["key"]
    given["length"] = given["first"] = int32(1, 1)
    torch.ops.uncomp.append_kv_(**given)
    assert given["row_len"].tolist() == [2, 3, 4, 1]
