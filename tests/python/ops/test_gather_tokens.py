# SPDX-License-Identifier: Apache-2.0
"""gather_tokens: hidden states, cos, sin and positions follow one index, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.gather_tokens import gather_tokens as reference
from support import assert_same_bits_for_threads, capture_graph, opcheck

import uncomp
from uncomp import ops


def example(device="cpu", batch=2, tokens=9, wanted=5):
    tensors = [
        torch.randn(batch, tokens, 24, device=device, dtype=torch.bfloat16),
        torch.randn(1, tokens, 6, device=device),
        torch.arange(batch * tokens, device=device).view(batch, tokens),
    ]
    index = torch.randint(-1, tokens, (batch, wanted), dtype=torch.int32, device=device)
    return tensors, index


# ---- values
def test_equals_reference(device):
    tensors, index = example(device)
    for got, want in zip(ops.gather_tokens(tensors, index), reference(tensors, index), strict=True):
        assert torch.equal(got.cpu(), want)


def test_strided_sources(device):
    wide = torch.randn(3, 11, 2, 16, device=device, dtype=torch.float16)
    source, index = wide[:, 1:, 1], torch.tensor([[9, 0], [1, -1], [4, 4]], dtype=torch.int32, device=device)
    assert torch.equal(ops.gather_tokens([source], index)[0].cpu(), reference([source], index)[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 6), st.integers(1, 40), st.integers(1, 8))
def test_random_shapes(batch, tokens, wanted, width, count):
    tensors = [torch.randn(batch if i % 2 else 1, tokens, width + i) for i in range(count)]
    index = torch.randint(-1, tokens, (batch, wanted), dtype=torch.int32)
    for got, want in zip(ops.gather_tokens(tensors, index), reference(tensors, index), strict=True):
        assert torch.equal(got, want)


# ---- edges
def test_empty_index(device):
    tensors, index = example(device, wanted=0)
    assert [tuple(t.shape) for t in ops.gather_tokens(tensors, index)] == [(2, 0, 24), (2, 0, 6), (2, 0)]


def test_only_padding_without_tokens(device):
    index = torch.full((2, 3), -1, dtype=torch.int32, device=device)
    out = ops.gather_tokens([torch.randn(2, 0, 8, device=device)], index)[0]
    assert torch.equal(out.cpu(), torch.zeros(2, 3, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_copied(device, value):
    source = torch.full((1, 2, 4), value, device=device)
    out = ops.gather_tokens([source], torch.tensor([[1]], dtype=torch.int32, device=device))[0]
    assert torch.equal(out.view(torch.int32), source[:, 1:].view(torch.int32))


# ---- errors
@pytest.mark.parametrize(
    ("tensors", "index", "kind", "text"),
    [
        ([], torch.zeros(1, 1, dtype=torch.int32), ValueError, "tensors must hold 1 to 8 tensors; got 0"),
        ([torch.ones(1, 2, 3)], torch.zeros(1, 1), TypeError, "index must be int32; got float32"),
        ([torch.ones(1, 2, 3)], torch.zeros(1, dtype=torch.int32), ValueError, r"index must have shape \[B, N\]"),
        (
            [torch.ones(3, 2, 3)],
            torch.zeros(2, 1, dtype=torch.int32),
            ValueError,
            r"tensors\[0\] must have 2 sequences",
        ),
        (
            [torch.ones(1, 2, 3), torch.ones(1, 3, 3)],
            torch.zeros(1, 1, dtype=torch.int32),
            ValueError,
            r"tensors\[1\] must have 2 tokens like tensors\[0\]; got 3",
        ),
        (
            [torch.ones(1, 2, 3, 2).transpose(2, 3)],
            torch.zeros(1, 1, dtype=torch.int32),
            ValueError,
            "must be contiguous behind its token dimension",
        ),
        ([torch.ones(1, 2, 3)], torch.full((1, 1), 2, dtype=torch.int32), ValueError, r"index must lie in \[-1, 2\)"),
        ([torch.ones(1, 2, 3)], torch.full((1, 1), -2, dtype=torch.int32), ValueError, "got -2"),
    ],
)
def test_errors_name_the_argument(tensors, index, kind, text):
    with pytest.raises(kind, match="uncomp::gather_tokens: .*" + text):
        ops.gather_tokens(tensors, index)


@pytest.mark.gpu
def test_index_outside_on_the_device_is_zero_and_reported():
    index = torch.tensor([[0, 7]], dtype=torch.int32, device="cuda")
    out = ops.gather_tokens([torch.ones(1, 4, 8, device="cuda")], index)[0]
    assert torch.equal(out.cpu(), torch.tensor([1.0, 0.0]).view(1, 2, 1).expand(1, 2, 8))
    with pytest.raises(ValueError, match="uncomp::gather_tokens: index must lie in"):
        uncomp.raise_device_errors()


@pytest.mark.gpu
def test_mixed_devices_are_refused():
    with pytest.raises(ValueError, match="must be on cuda:0 where index is; got cpu"):
        ops.gather_tokens([torch.ones(1, 4, 8)], torch.zeros(1, 1, dtype=torch.int32, device="cuda"))


def test_gradients_are_refused():
    with pytest.raises(NotImplementedError, match="inference only"):
        ops.gather_tokens([torch.ones(1, 2, 3, requires_grad=True)], torch.zeros(1, 1, dtype=torch.int32))


# ---- opcheck
def test_opcheck(device):
    opcheck("gather_tokens", *example(device))


# ---- compile
def test_compile_fullgraph(device):
    tensors, index = example(device)
    compiled = torch.compile(lambda t, i: [x * 2 for x in ops.gather_tokens(t, i)], fullgraph=True)
    for got, want in zip(compiled(tensors, index), ops.gather_tokens(tensors, index), strict=True):
        assert torch.equal(got, want * 2)


def test_the_number_of_threads_changes_no_bit():
    tensors, index = [torch.randn(2, 300, 1000), torch.randn(1, 300, 3, dtype=torch.float64)], example(wanted=257)[1]
    assert_same_bits_for_threads(lambda: ops.gather_tokens(tensors, index))


@pytest.mark.gpu
def test_graph_replay_follows_the_index():
    tensors, index = example("cuda")
    replay, out = capture_graph(lambda: ops.gather_tokens(tensors, index))
    index.copy_(index.flip(1))
    replay()
    for got, want in zip(out, reference(tensors, index), strict=True):
        assert torch.equal(got.cpu(), want)
