# SPDX-License-Identifier: Apache-2.0
"""matrix_spectrum: eigenvalues of the centred, normalised token covariance, alike on every device and layout."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.matrix_spectrum import matrix_spectrum as reference
from support import assert_same_bits_for_threads, capture_graph, opcheck

import uncomp
from uncomp import ops
from uncomp.testing import EIGENVALUE_TOLERANCE, ENTROPY_TOLERANCE

HALF = (torch.float16, torch.bfloat16)


def entropy_of(spectrum, top, dim):
    return ops.matrix_entropy(spectrum.contiguous(), top, dim)[0].double().cpu()


def check(states, top=None, first=None, length=None):
    """Entropy within the tolerance of the dtype at D/4 and D eigenvalues; shape, order and sign as promised."""
    dim = states.shape[3]
    got = ops.matrix_spectrum(states, dim, first=first, length=length)
    want = reference(states, first, length, dim)
    assert got.shape == want.shape
    assert got.dtype == (torch.float64 if states.dtype == torch.float64 else torch.float32)
    assert torch.equal(got.isnan().cpu(), want.isnan())
    kept = got.nan_to_num().cpu()
    assert (kept >= 0).all()
    assert (kept[..., 1:] <= kept[..., :-1]).all()
    tolerance = ENTROPY_TOLERANCE[states.dtype]
    assert (kept.double() - want.nan_to_num()).abs().max() <= tolerance
    for k in {max(1, dim // 4), dim} if top is None else {top}:
        off = (entropy_of(got, k, dim) - entropy_of(want, k, dim)).nan_to_num().abs().max()
        assert off <= tolerance, f"k {k}: entropy off by {off:.2e}"
    return got


def vector_1():
    return torch.tensor(
        [[math.sin(1.3 * i + 0.7 * j * j) + 0.1 * i * j for j in range(4)] for i in range(6)], dtype=torch.float64
    )


def vector_2():
    return torch.tensor(
        [[math.sin(0.37 * i + 0.11 * j * j) + 0.05 * ((7 * i + 13 * j) % 11) for j in range(16)] for i in range(64)],
        dtype=torch.float64,
    )


def on(device, x, dtype=torch.float32):
    """A head as [1, 1, S, D]; float64 exists on the CPU alone."""
    return x.to(device, dtype)[None, None]


# ---- values
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_worked_vector_1(device, dtype):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 on the CPU alone")
    got = ops.matrix_spectrum(on(device, vector_1(), dtype), 4)[0, 0].double().cpu()
    want = torch.tensor([0.56379540, 0.27739062, 0.15881398, 0.0], dtype=torch.float64)
    assert (got - want).abs().max() < 1e-6
    entropy = [float(entropy_of(got, k, 4)) for k in (1, 2, 3)]
    assert entropy == pytest.approx([0.23306073, 0.48964831, 0.70044133], abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_worked_vector_2(device, dtype):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 on the CPU alone")
    got = ops.matrix_spectrum(on(device, vector_2(), dtype), 16)[0, 0].double().cpu()
    want = torch.tensor([0.54803088, 0.40771315, 0.01464542, 0.01439578], dtype=torch.float64)
    assert (got[:4] - want).abs().max() < 1e-6
    nats = [float(entropy_of(got, k, 16)) * math.log(16) for k in (4, 8, 16)]
    assert nats == pytest.approx([0.81830218, 0.88552065, 0.91021526], abs=1e-5)


@pytest.mark.parametrize(
    ("r", "truncated", "full"), [(1, 0, 0), (8, 3 / 7, 3 / 7), (32, 5 / 7, 5 / 7), (64, 3 / 7, 6 / 7), (128, 1 / 4, 1)]
)
def test_worked_vector_3_equal_eigenvalues(device, r, truncated, full):
    axes = torch.eye(128)[:r]
    states = on(device, torch.cat([axes, -axes]))
    spectrum = ops.matrix_spectrum(states, 128)
    assert float(entropy_of(spectrum, 32, 128)) == pytest.approx(truncated, abs=5e-5)
    assert float(entropy_of(spectrum, 128, 128)) == pytest.approx(full, abs=5e-5)
    want = torch.zeros(128)
    want[:r] = 1 / r
    assert (spectrum.cpu()[0, 0] - want).abs().max() <= EIGENVALUE_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("dim", [2, 3, 32, 64, 80, 96, 128, 256])
def test_random_states(device, dtype, dim):
    mix = torch.randn(dim, dim) / dim**0.5
    check((torch.randn(1, 2, 299, dim) @ mix + torch.randn(dim)).to(device, dtype))


def test_float64():
    check(torch.randn(2, 3, 70, 24, dtype=torch.float64))
    check(torch.randn(1, 1, 20, 300, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 8, 32])
def test_long_prompts_over_many_chunks(dtype, heads):
    mix = torch.randn(128, 128, device="cuda") * torch.linspace(0.1, 2, 128, device="cuda")
    check((torch.randn(1, heads, 8200, 128, device="cuda") @ mix).to(dtype))


def test_offset_of_1000_deviations_in_one_channel(device):
    x = torch.randn(1, 1, 500, 64)
    x[..., 5] += 1000
    check(x.to(device))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_has_no_effect(device, scale):
    x = torch.randn(1, 2, 130, 64, device=device)
    plain, scaled = ops.matrix_spectrum(x, 64), ops.matrix_spectrum(x * scale, 64)
    assert (plain - scaled).abs().max() < 1e-6
    half = ops.matrix_spectrum((x * scale).to(torch.bfloat16), 64)
    assert (half - plain).abs().max() < 1e-3


def test_permuted_shifted_and_rotated_tokens_keep_the_entropy(device):
    x = torch.randn(1, 1, 400, 32)
    rotation = torch.linalg.qr(torch.randn(32, 32))[0]
    want = entropy_of(ops.matrix_spectrum(x.to(device), 32), 8, 32)
    for y in (x[:, :, torch.randperm(400)], x + torch.randn(32), x @ rotation):
        assert (entropy_of(ops.matrix_spectrum(y.to(device), 32), 8, 32) - want).abs().max() < 1e-5


def test_strided_and_unaligned_states(device):
    for dtype in (torch.float32, *HALF):
        wide = torch.randn(3, 50, 4, 70, device=device).to(dtype)
        check(wide.transpose(1, 2)[:, 1:, 3:, 5:69])
        check(wide[..., :64].transpose(1, 2))
        check(wide[:, ::2, :, 1:].transpose(1, 2))


def test_shared_head_through_stride_zero(device):
    states = torch.randn(1, 1, 40, 16, device=device).expand(2, 3, 40, 16)
    got = ops.matrix_spectrum(states, 5)
    assert torch.equal(got, got[:1, :1].expand_as(got))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.sampled_from([torch.float64, torch.float32, *HALF]),
    st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e30, 1e-30, 60000.0]),
    st.booleans(),
)
def test_any_input_gives_the_contract_or_the_right_error(batch, heads, tokens, dim, seed, dtype, value, last_strided):
    generator = torch.Generator().manual_seed(seed)
    pick = lambda high: int(torch.randint(high, (1,), generator=generator))  # noqa: E731
    states = torch.randn(batch, heads, tokens, dim + 2, generator=generator).to(dtype)[..., 1 : dim + 1]
    if states.numel() and pick(2):
        states[pick(batch), pick(heads), pick(tokens), pick(dim)] = torch.tensor(value).to(dtype)
    if last_strided:
        states = states.transpose(2, 3).contiguous().transpose(2, 3)
    first = torch.tensor([pick(tokens + 1) for _ in range(batch)], dtype=torch.int32)
    length = torch.tensor([pick(tokens - int(f) + 1) for f in first], dtype=torch.int32)
    refused = dim < 2 or (states.stride(3) != 1 and dim > 1)
    if refused:
        with pytest.raises(ValueError, match=r"uncomp::matrix_spectrum: states must"):
            ops.matrix_spectrum(states, 1, first=first, length=length)
    else:
        check(states, first=first, length=length)


# ---- edges
@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens(device, tokens):
    got = ops.matrix_spectrum(torch.randn(2, 3, tokens, 64, device=device), 64).cpu()
    want = torch.zeros_like(got)
    if tokens == 2:
        want[..., 0] = 1
    assert (got - want).abs().max() < 1e-6
    assert not (got[..., 1:] > 1e-6).any()


def test_no_sequences_or_heads(device):
    assert ops.matrix_spectrum(torch.zeros(0, 3, 5, 8, device=device), 2).shape == (0, 3, 2)
    assert ops.matrix_spectrum(torch.zeros(2, 0, 5, 8, device=device), 2).shape == (2, 0, 2)


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.3])
def test_equal_tokens_give_zeros(device, value):
    for dtype in (torch.float32, *HALF):
        got = ops.matrix_spectrum(torch.full((1, 2, 77, 80), value, device=device, dtype=dtype), 80)
        assert torch.equal(got.cpu(), torch.zeros(1, 2, 80))


def test_a_token_equal_to_the_mean_adds_nothing(device):
    pair = torch.randn(1, 1, 6, 16)
    balanced = torch.cat([pair, -pair], dim=2)
    with_mean = torch.cat([balanced, torch.zeros(1, 1, 1, 16)], dim=2) + 3
    a, b = ops.matrix_spectrum((balanced + 3).to(device), 16), ops.matrix_spectrum(with_mean.to(device), 16)
    assert (a - b).abs().max() < 1e-5


def test_duplicated_tokens_keep_the_spectrum(device):
    x = torch.randn(1, 2, 20, 48, device=device)
    a, b = ops.matrix_spectrum(x, 48), ops.matrix_spectrum(torch.cat([x, x, x], dim=2), 48)
    assert (a - b).abs().max() < 1e-6
    assert (a[..., 19:] < 1e-6).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_nan_stays_in_its_head(device, value, dtype, dim):
    states = torch.randn(2, 2, 100, dim, device=device).to(dtype)
    clean = ops.matrix_spectrum(states, 8)
    states[1, 0, 37, 5] = value
    got = ops.matrix_spectrum(states, 8)
    assert got[1, 0].isnan().all()
    got[1, 0] = clean[1, 0]
    assert torch.equal(got, clean)


def test_padding_holds_nan_without_effect(device):
    for dtype in (torch.float32, *HALF):
        states = torch.randn(3, 2, 90, 64, device=device).to(dtype)
        first = torch.tensor([80, 0, 17], dtype=torch.int32, device=device)
        length = torch.tensor([10, 65, 0], dtype=torch.int32, device=device)
        columns = torch.arange(90, device=device)
        real = (columns >= first[:, None]) & (columns < (first + length)[:, None])
        states.masked_fill_(~real[:, None, :, None], float("nan"))
        check(states, first=first, length=length)


@pytest.mark.gpu
def test_lengths_outside_the_tensor_are_clamped_on_the_device():
    states = torch.randn(2, 1, 20, 32, device="cuda")
    first = torch.tensor([-3, 15], dtype=torch.int32, device="cuda")
    length = torch.tensor([2**31 - 1, 2**31 - 1], dtype=torch.int32, device="cuda")
    got = ops.matrix_spectrum(states, 32, first=first, length=length).cpu()
    want = [reference(states[:1], None, None, 32)[0], reference(states[1:, :, 15:], None, None, 32)[0]]
    assert (got - torch.stack(want)).abs().max() < 1e-5


# ---- errors
@pytest.mark.parametrize(
    ("states", "top", "kind", "text"),
    [
        (torch.zeros(1, 4, 8), 1, ValueError, r"states must have shape \[B, H, S, D\]; got \[1, 4, 8\]"),
        (torch.zeros(1, 1, 4, 8, dtype=torch.int32), 1, TypeError, "states must be float64, .* got int32"),
        (torch.zeros(1, 1, 4, 1), 1, ValueError, "states must have at least 2 channels; got 1"),
        (torch.zeros(1, 1, 4, 8), 0, ValueError, r"top must lie in \[1, 8\]; got 0"),
        (torch.zeros(1, 1, 4, 8), 9, ValueError, r"top must lie in \[1, 8\]; got 9"),
        (torch.zeros(1, 1, 8, 4).mT, 1, ValueError, "states must be contiguous in its last dimension"),
    ],
)
def test_errors_name_the_argument(states, top, kind, text):
    with pytest.raises(kind, match="uncomp::matrix_spectrum: " + text):
        ops.matrix_spectrum(states, top)


@pytest.mark.parametrize(
    ("first", "length", "kind", "text"),
    [
        ([0], None, ValueError, r"first must have shape \[B\] = \[2\]; got \[1\]"),
        ([0.0, 0.0], None, TypeError, "first must be int32; got float32"),
        (None, [1, 5], ValueError, "must mark columns of the 4 tokens; got first 0 and length 5 in sequence 1"),
        ([-1, 0], None, ValueError, "got first -1"),
        ([3, 0], [2, 0], ValueError, "got first 3 and length 2 in sequence 0"),
    ],
)
def test_wrong_lengths_are_refused(first, length, kind, text):
    def make(x):
        return None if x is None else torch.tensor(x, dtype=torch.float32 if isinstance(x[0], float) else torch.int32)

    with pytest.raises(kind, match="uncomp::matrix_spectrum: .*" + text):
        ops.matrix_spectrum(torch.zeros(2, 1, 4, 8), 1, first=make(first), length=make(length))


@pytest.mark.gpu
def test_limits_of_the_device():
    with pytest.raises(NotImplementedError, match=r"at most 256 channels on CUDA \(the CPU takes any\); got 257"):
        ops.matrix_spectrum(torch.zeros(1, 1, 4, 257, device="cuda"), 1)
    with pytest.raises(TypeError, match="states must be float32, float16 or bfloat16; got float64"):
        ops.matrix_spectrum(torch.zeros(1, 1, 4, 8, device="cuda", dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="first must be on cuda:0 where states is; got cpu"):
        ops.matrix_spectrum(torch.zeros(1, 1, 4, 8, device="cuda"), 1, first=torch.zeros(1, dtype=torch.int32))


# ---- opcheck
def test_opcheck(device):
    states = torch.randn(2, 3, 20, 16, device=device)
    length = torch.tensor([20, 7], dtype=torch.int32, device=device)
    opcheck("matrix_spectrum", states, None, None, 4)
    opcheck("matrix_spectrum", states, torch.zeros_like(length), length, 16)


# ---- compile
def test_compile_fullgraph(device):
    states = torch.randn(2, 3, 20, 16, device=device)
    compiled = torch.compile(lambda x: ops.matrix_spectrum(x, 4) * 2, fullgraph=True)
    assert torch.equal(compiled(states), ops.matrix_spectrum(states, 4) * 2)


@pytest.mark.parametrize(("heads", "dim"), [(5, 64), (2, 256)])
def test_the_number_of_threads_changes_no_bit(heads, dim):
    """Up to 256 channels; beyond, LAPACK's last bits are its own."""
    states = torch.randn(2, heads, 400, dim, dtype=torch.float64)
    length = torch.tensor([400, 37], dtype=torch.int32)
    assert_same_bits_for_threads(lambda: (ops.matrix_spectrum(states, dim, length=length),))


def test_several_threads_take_inference_tensors():
    states = torch.randn(1, 8, 300, 64)
    want = ops.matrix_spectrum(states, 16)
    with torch.inference_mode():
        assert torch.equal(ops.matrix_spectrum(states.clone(), 16), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_graph_replay_follows_the_states_with_the_same_bits(dim):
    states = torch.randn(2, 8, 1000, dim, device="cuda", dtype=torch.bfloat16)
    replay, out = capture_graph(lambda: ops.matrix_spectrum(states, dim // 4))
    states.copy_(torch.randn_like(states))
    for _ in range(3):
        replay()
        assert torch.equal(out, ops.matrix_spectrum(states, dim // 4))
    uncomp.raise_device_errors()
