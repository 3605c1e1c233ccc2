# SPDX-License-Identifier: Apache-2.0
"""What the key transform of decode_attention and decode_evict_ refuses, and what torch knows of its arguments."""

import dataclasses

import pytest
import torch
from evict_state import defaults, run
from key_transform_support import DTYPES, evict_example, example
from support import opcheck

from uncomp import ops


# ---- errors
@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"basis": lambda b: b.half()}, TypeError, r"key_basis must have the dtype of query \(float32\); got float16"),
        ({"basis": lambda b: b[0]}, ValueError, r"key_basis must have shape \[Hkv, r, D\]; got \[32, 64\]"),
        (
            {"basis": lambda b: b[:, :16]},
            ValueError,
            r"key_basis must have shape \[Hkv, r, D\] = \[2, 32, 64\]; got \[2, 16, 64\]",
        ),
        (
            {"basis": lambda b: b.transpose(1, 2).contiguous().transpose(1, 2)},
            ValueError,
            "key_basis must be contiguous",
        ),
        (
            {"basis": lambda b: b[:1].repeat(3, 1, 1)},
            ValueError,
            "key_basis must have a number of heads that divides the 2 rows",
        ),
        ({"bias": lambda _: torch.zeros(2, 64).half()}, TypeError, "key_bias must be float32; got float16"),
        (
            {"bias": lambda _: torch.zeros(64)},
            ValueError,
            r"key_bias must have shape \[Hkv, D\] = \[2, 64\]; got \[64\]",
        ),
        ({"norm": lambda _: torch.zeros(32)}, ValueError, r"key_norm must have shape \[D\] = \[64\]; got \[32\]"),
        (
            {"norm_eps": lambda _: -1.0},
            ValueError,
            "key_norm_eps must be a finite number of float32 and at least 0; got -1",
        ),
        (
            {"frequency": lambda _: torch.zeros(33)},
            ValueError,
            "rotary_frequency must turn at most the 64 channels of query; got 66",
        ),
        ({"frequency": lambda f: f.double()}, TypeError, "rotary_frequency must be float32; got float64"),
        ({"frequency": lambda f: f * torch.inf}, ValueError, "rotary_frequency must be finite; got inf at place 0"),
        ({"norm_eps": lambda _: 1e39}, ValueError, r"key_norm_eps must be a finite number of float32 .* got 1e\+39"),
        ({"rotary_scale": lambda _: 1e39}, ValueError, r"rotary_scale must be a finite number of float32; got 1e\+39"),
        (
            {"rotary_scale": lambda _: float("nan")},
            ValueError,
            "rotary_scale must be a finite number of float32; got nan",
        ),
        (
            {"offset": lambda _: torch.zeros(3, dtype=torch.int32)},
            ValueError,
            r"position_offset must have shape \[B\] = \[2\]; got \[3\]",
        ),
        ({"offset": lambda _: torch.zeros(2)}, TypeError, "position_offset must be int32; got float32"),
    ],
)
@pytest.mark.parametrize("op", ["decode_attention", "decode_evict_"])
def test_errors_name_the_argument(op, change, kind, text):
    if op == "decode_attention":
        args, made = example()
        transform = made["key_transform"]
    else:
        state, token, transform, _, _ = evict_example(torch.float32)
    transform = dataclasses.replace(transform, **{k: f(getattr(transform, k)) for k, f in change.items()})
    with pytest.raises(kind, match=f"uncomp::{op}: " + text):
        if op == "decode_attention":
            ops.decode_attention(*args, key_transform=transform, slot_position=made["slot_position"])
        else:
            run(state, token, key_transform=transform, **defaults())


def test_errors_of_one_operator():
    args, made = example()
    with pytest.raises(ValueError, match="decode_attention: slot_position must come with rotary_frequency; got None"):
        ops.decode_attention(*args, key_transform=made["key_transform"])
    with pytest.raises(ValueError, match=r"decode_attention: slot_position must have shape \[C\]"):
        ops.decode_attention(*args, key_transform=made["key_transform"], slot_position=made["slot_position"][1:])
    with pytest.raises(ValueError, match="decode_attention: key_bias must come with key_basis; got it alone"):
        torch.ops.uncomp.decode_attention(args[0][..., :32], *args[1:], key_bias=torch.zeros(2, 64))
    state, token, transform, _, _ = evict_example(torch.float32)
    one = dataclasses.replace(transform, basis=transform.basis[:1])
    with pytest.raises(ValueError, match="decode_evict_: key_basis must have the 2 heads of key; got 1"):
        run(state, token, key_transform=one, **defaults())


def test_nothing_is_written_when_a_frequency_is_refused():
    state, token, transform, _, _ = evict_example(torch.float32)
    before = state.clone()
    bad = dataclasses.replace(transform, frequency=transform.frequency * torch.nan)
    with pytest.raises(ValueError, match="rotary_frequency must be finite"):
        run(state, token, key_transform=bad, **defaults())
    for a, b in zip(state.arguments(), before.arguments(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


# ---- opcheck
def arguments(transform):
    return tuple(
        getattr(transform, name) for name in ("basis", "bias", "norm", "norm_eps", "frequency", "rotary_scale")
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    args, made = example(dtype=dtype, device=device, bias=True, norm=True, offset=2)
    k = made["key_transform"]
    opcheck("decode_attention", *args, *arguments(k), made["slot_position"], k.offset)
    state, token, k, _, _ = evict_example(dtype, device, bias=True, norm=True, offset=2)
    token = [t.to(device) for t in token]
    opcheck("decode_evict_", *token, *state.arguments(), 2, 0, 3, 0.125, "max", "mean", *arguments(k), k.offset)
