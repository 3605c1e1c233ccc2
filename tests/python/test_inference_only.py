# SPDX-License-Identifier: Apache-2.0
"""No operator is differentiated in silence, backward or forward; calls without derivatives are not disturbed."""

import pytest
import torch
from torch.autograd import forward_ad

from uncomp import ops


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def decode(query, keys=None):
    keys = torch.linspace(-1, 1, 80).view(5, 16) if keys is None else keys
    return ops.decode_attention(query, keys, keys.detach(), int32(0, 5), int32(5), 1.0)[0]


def spectrum(states):
    return ops.matrix_spectrum(states, 3)


CALLS = [(decode, (1, 1, 1, 16), "decode_attention", "query"), (spectrum, (1, 1, 6, 4), "matrix_spectrum", "states")]


def refused(op, name, why="has a forward-mode tangent"):
    return pytest.raises(NotImplementedError, match=f"^uncomp::{op}: inference only; {name} {why}")


@pytest.mark.parametrize(("call", "shape", "op", "name"), CALLS)
def test_derivatives_are_refused(call, shape, op, name):
    x = torch.randn(shape)
    with refused(op, name):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with refused(op, name):
        torch.func.jacfwd(call)(x)
    with refused(op, name, "requires a gradient"):
        torch.func.grad(lambda t: call(t).sum())(x)
    with refused(op, name, "requires a gradient"):
        call(x.clone().requires_grad_())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_dual_numbers_are_refused_in_every_place(mode):
    """torch.no_grad() leaves tangents alone, so they are refused there too."""
    x, keys = torch.randn(1, 1, 1, 16), torch.randn(5, 16)
    with forward_ad.dual_level(), mode():
        with refused("decode_attention", "query"):
            decode(forward_ad.make_dual(x, torch.ones_like(x)))
        with refused("decode_attention", "key_rows"):
            decode(x, forward_ad.make_dual(keys, torch.ones_like(keys)))
        tensors = [torch.ones(1, 2, 3), forward_ad.make_dual(torch.ones(1, 2, 3), torch.ones(1, 2, 3))]
        with refused("gather_tokens", r"tensors\[1\]"):
            ops.gather_tokens(tensors, torch.zeros(1, 1, dtype=torch.int32))


def test_the_tensor_of_a_list_is_named():
    tensors = [torch.ones(1, 2, 3), torch.ones(1, 2, 3, requires_grad=True)]
    with refused("gather_tokens", r"tensors\[1\]", "requires a gradient"):
        ops.gather_tokens(tensors, torch.zeros(1, 1, dtype=torch.int32))


def test_primals_pass():
    x, keys = torch.randn(1, 1, 1, 16), torch.randn(5, 16)
    want = decode(x, keys)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.equal(decode(forward_ad.unpack_dual(dual).primal, keys), want)
    with torch.no_grad():
        assert torch.equal(decode(x.clone().requires_grad_(), keys), want)
