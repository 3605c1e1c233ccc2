# SPDX-License-Identifier: Apache-2.0
"""matrix_entropy: three ways from a spectrum to a number, truncation without renormalisation being the method."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.matrix_entropy import matrix_entropy as reference
from support import capture_graph, opcheck

from uncomp import ops

KINDS = ["truncated", "renormalized", "renyi2"]


def shares(*shape, dtype=torch.float64):
    """Random spectra, descending, of trace 1."""
    x = torch.rand(*shape, dtype=torch.float64) ** 4
    return (x / x.sum(-1, keepdim=True)).sort(-1, descending=True).values.to(dtype)


# ---- values
def test_worked_vector_1(device):
    spectrum = torch.tensor([0.56379540, 0.27739062, 0.15881398, 0.0], dtype=torch.float64, device=device)
    nats = [float(ops.matrix_entropy(spectrum, k, 4)[0]) * math.log(4) for k in (1, 2, 3, 4)]
    assert nats == pytest.approx([0.32309077, 0.67879669, 0.97101786, 0.97101786], abs=1e-6)
    assert float(ops.matrix_entropy(spectrum, 4, 4)[1]) == pytest.approx(2.64063090, abs=1e-6)
    assert float(ops.matrix_entropy(spectrum, 2, 4, kind="renormalized")[0]) == pytest.approx(0.45734117, abs=1e-6)
    assert float(ops.matrix_entropy(spectrum, 1, 4, kind="renyi2")[0]) == pytest.approx(
        0.86742275 / math.log(4), abs=1e-6
    )


@pytest.mark.parametrize(
    ("r", "truncated", "renormalized", "full"),
    [
        (1, 0, 0, 0),
        (8, 3 / 7, 3 / 7, 3 / 7),
        (32, 5 / 7, 5 / 7, 5 / 7),
        (64, 3 / 7, 5 / 7, 6 / 7),
        (128, 1 / 4, 5 / 7, 1),
    ],
)
def test_worked_vector_3(device, r, truncated, renormalized, full):
    spectrum = torch.zeros(128, device=device)
    spectrum[:r] = 1 / r
    assert float(ops.matrix_entropy(spectrum, 32, 128)[0]) == pytest.approx(truncated, abs=5e-5)
    got = ops.matrix_entropy(spectrum, 32, 128, kind="renormalized")[0]
    assert float(got) == pytest.approx(renormalized, abs=5e-5)
    entropy, erank = ops.matrix_entropy(spectrum, 128, 128)
    assert float(entropy) == pytest.approx(full, abs=5e-5)
    assert float(erank) == pytest.approx(r, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_reference(device, kind, dtype):
    for rows, dim, top in ((1, 2, 1), (7, 16, 4), (300, 128, 32), (5, 300, 300)):
        spectrum = shares(rows, dim, dtype=dtype)
        entropy, erank = ops.matrix_entropy(spectrum.to(device), top, dim, kind=kind)
        want_entropy, want_erank = reference(spectrum, top, dim, kind)
        assert entropy.dtype == erank.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 1e-13
        assert entropy.tolist() == pytest.approx(want_entropy, abs=tolerance)
        assert erank.tolist() == pytest.approx(want_erank, rel=20 * tolerance)


def test_cut_spectra_need_no_more_than_top_eigenvalues(device):
    spectrum = shares(2, 3, 64, dtype=torch.float32).to(device)
    whole, cut = ops.matrix_entropy(spectrum, 16, 64), ops.matrix_entropy(spectrum[..., :16].contiguous(), 16, 64)
    assert whole[0].shape == (2, 3)
    assert torch.equal(whole[0], cut[0]) and torch.equal(whole[1], cut[1])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(1, 40),
    st.integers(-1, 42),
    st.integers(0, 44),
    st.sampled_from([*KINDS, "shannon"]),
    st.sampled_from([torch.float32, torch.float64, torch.float16]),
    st.sampled_from([0.0, math.nan, -1e-7]),
    st.booleans(),
)
def test_any_input_gives_the_contract_or_the_right_error(rows, count, top, dim, kind, dtype, value, strided):
    spectrum = shares(rows, count, dtype=dtype)
    spectrum[:, -1] = value
    spectrum = spectrum.mT.contiguous().mT if strided else spectrum
    if dtype == torch.float16:
        kinds = TypeError
    elif (
        not spectrum.is_contiguous()
        or dim < max(2, count)
        or not 1 <= top <= count
        or kind == "shannon"
        or (kind == "renyi2" and count != dim)
    ):
        kinds = ValueError
    else:
        entropy, erank = ops.matrix_entropy(spectrum, top, dim, kind=kind)
        want = reference(spectrum, top, dim, kind)
        assert entropy.tolist() == pytest.approx(want[0], abs=1e-6, nan_ok=True)
        assert erank.tolist() == pytest.approx(want[1], rel=1e-5, nan_ok=True)
        return
    with pytest.raises(kinds, match="uncomp::matrix_entropy: "):
        ops.matrix_entropy(spectrum, top, dim, kind=kind)


# ---- edges
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_have_entropy_0_and_rank_1(device, kind):
    entropy, erank = ops.matrix_entropy(torch.zeros(3, 16, device=device), 16, 16, kind=kind)
    assert torch.equal(entropy.cpu(), torch.zeros(3))
    assert torch.equal(erank.cpu(), torch.ones(3))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_spectrum(device, kind):
    spectrum = shares(3, 8, dtype=torch.float32).to(device)
    clean = ops.matrix_entropy(spectrum, 8, 8, kind=kind)
    spectrum[1, 2] = float("nan")
    for got, want in zip(ops.matrix_entropy(spectrum, 8, 8, kind=kind), clean, strict=True):
        assert got.isnan().tolist() == [False, True, False]
        assert torch.equal(got[::2], want[::2])


def test_nan_behind_the_kept_eigenvalues_has_no_effect(device):
    spectrum = shares(8, dtype=torch.float32).to(device)
    want = ops.matrix_entropy(spectrum, 3, 8)[0]
    spectrum[3:] = float("nan")
    assert torch.equal(ops.matrix_entropy(spectrum, 3, 8)[0], want)


def test_one_spectrum_and_none(device):
    assert ops.matrix_entropy(torch.ones(2, device=device) / 2, 2, 2)[0].shape == ()
    assert ops.matrix_entropy(torch.zeros(2, 0, 4, device=device), 4, 4)[0].shape == (2, 0)


# ---- errors
@pytest.mark.parametrize(
    ("spectrum", "top", "dim", "kind", "error", "text"),
    [
        (
            torch.zeros(4, dtype=torch.float16),
            1,
            4,
            "truncated",
            TypeError,
            "spectrum must be float32 or float64; got float16",
        ),
        (torch.zeros(()), 1, 4, "truncated", ValueError, r"spectrum must have shape \[..., N\]"),
        (torch.zeros(4, 2).mT, 1, 4, "truncated", ValueError, "spectrum must be contiguous"),
        (torch.zeros(4), 1, 1, "truncated", ValueError, "dim must be at least 2; got 1"),
        (torch.zeros(4), 1, 3, "truncated", ValueError, "spectrum must have at most dim = 3 eigenvalues; got 4"),
        (torch.zeros(4), 0, 4, "truncated", ValueError, r"top must lie in \[1, 4\]; got 0"),
        (torch.zeros(4), 5, 8, "truncated", ValueError, r"top must lie in \[1, 4\]; got 5"),
        (torch.zeros(4), 1, 4, "shannon", ValueError, 'kind must be "truncated", .*; got "shannon"'),
        (torch.zeros(4), 1, 8, "renyi2", ValueError, 'kind "renyi2" needs all 8 eigenvalues; got 4'),
    ],
)
def test_errors_name_the_argument(spectrum, top, dim, kind, error, text):
    with pytest.raises(error, match="uncomp::matrix_entropy: " + text):
        ops.matrix_entropy(spectrum, top, dim, kind=kind)


# ---- opcheck
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(device, kind):
    opcheck("matrix_entropy", shares(2, 3, 8, dtype=torch.float32).to(device), 4, 8, kind)


# ---- compile
def test_compile_fullgraph(device):
    spectrum = shares(6, 16, dtype=torch.float32).to(device)
    compiled = torch.compile(lambda x: ops.matrix_entropy(x, 4, 16)[0] * 2, fullgraph=True)
    assert torch.equal(compiled(spectrum), ops.matrix_entropy(spectrum, 4, 16)[0] * 2)


@pytest.mark.gpu
def test_graph_replay_follows_the_spectrum():
    spectrum = shares(40, 128, dtype=torch.float32).cuda()
    replay, (entropy, erank) = capture_graph(lambda: ops.matrix_entropy(spectrum, 32, 128))
    spectrum.copy_(shares(40, 128))
    replay()
    again = ops.matrix_entropy(spectrum, 32, 128)
    assert torch.equal(entropy, again[0]) and torch.equal(erank, again[1])
