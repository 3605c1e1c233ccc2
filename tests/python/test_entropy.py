# SPDX-License-Identifier: Apache-2.0
"""entropy: from queries to one number per cache row, and the elbow of a spectrum."""

import math

import pytest
import torch

from uncomp import entropy, ops
from uncomp.testing import ENTROPY_TOLERANCE


def vector_1():
    i, j = torch.arange(6.0, dtype=torch.float64)[:, None], torch.arange(4.0, dtype=torch.float64)[None]
    return torch.sin(1.3 * i + 0.7 * j * j) + 0.1 * i * j


def vector_2():
    i, j = torch.arange(64)[:, None], torch.arange(16)[None]
    return torch.sin(0.37 * i.double() + 0.11 * (j * j).double()) + 0.05 * ((7 * i + 13 * j) % 11).double()


def of_head(states, device, **options):
    return float(entropy.row_entropy(states[None, None].to(device), 1, **options))


# ---- values
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_worked_vectors(device, dtype):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("the GPU takes no float64 states")
    tolerance = ENTROPY_TOLERANCE[dtype]
    first, second = vector_1().to(dtype), vector_2().to(dtype)
    for top, want in ((1, 0.23306073), (2, 0.48964831), (3, 0.70044133), (None, 0.23306073)):
        assert of_head(first, device, top=top) == pytest.approx(want, abs=tolerance)
    assert of_head(first, device, top=2, kind="renormalized") == pytest.approx(0.45734117, abs=tolerance)
    assert of_head(first, device, kind="renyi2") == pytest.approx(0.86742275 / math.log(4), abs=tolerance)
    assert of_head(second, device, top=16) == pytest.approx(0.32829076, abs=tolerance)
    assert of_head(second, device) == pytest.approx(0.81830218 / math.log(16), abs=tolerance)  # top = 4
    assert of_head(second, device, top=8, kind="renormalized") == pytest.approx(0.31923921, abs=tolerance)
    assert of_head(second, device, kind="renyi2") == pytest.approx(0.76135707 / math.log(16), abs=tolerance)


def test_elbows_of_the_worked_vectors():
    for states, want in ((vector_1(), 2), (vector_2(), 3)):
        spectrum = ops.matrix_spectrum(states[None, None], states.shape[1])[0, 0]
        assert entropy.elbow(spectrum.tolist()) == want


def test_rows_under_grouped_query_attention(device):
    heads = torch.tensor([[0.2, 0.6, 0.5, 0.45]], device=device)
    mean, most = entropy.reduce_heads(heads, 2, "mean"), entropy.reduce_heads(heads, 2, "max")
    assert mean[0].tolist() == pytest.approx([0.4, 0.475], abs=1e-6)
    assert most[0].tolist() == pytest.approx([0.6, 0.5], abs=1e-6)
    assert mean.argsort().tolist() == [[0, 1]]
    assert most.argsort().tolist() == [[1, 0]]


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_a_row_is_the_reduction_of_its_query_heads(device, reduce):
    query = torch.randn(2, 6, 40, 16, device=device)
    heads = entropy.row_entropy(query, 6)
    rows = entropy.row_entropy(query, 2, reduce=reduce)
    parts = heads.reshape(2, 2, 3)
    want = parts.mean(2) if reduce == "mean" else parts.amax(2)
    assert rows.dtype == torch.float32 and rows.shape == (2, 2)
    assert torch.equal(rows, want)
    spectrum = ops.matrix_spectrum(query, 4)
    assert torch.equal(heads, ops.matrix_entropy(spectrum, 4, 16)[0])


# ---- edges
def test_default_top_is_a_quarter_and_at_least_one():
    assert [entropy.default_top(d) for d in (2, 4, 64, 128)] == [1, 1, 16, 32]
    assert torch.isfinite(entropy.row_entropy(torch.randn(1, 1, 9, 2), 1)).all()


def test_float64_states_give_float32():
    assert entropy.row_entropy(torch.randn(1, 2, 9, 8, dtype=torch.float64), 2).dtype == torch.float32


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_nan_stays_in_its_row(device, reduce):
    query = torch.randn(2, 4, 20, 8, device=device)
    query[1, 2, 5, 3] = float("nan")
    assert entropy.row_entropy(query, 2, reduce=reduce).isnan().tolist() == [[False, False], [False, True]]


def test_padding_does_not_enter(device):
    query = torch.randn(2, 2, 30, 8, device=device)
    query[0, :, :11] = float("nan")
    first = torch.tensor([11, 0], dtype=torch.int32, device=device)
    padded = entropy.row_entropy(query, 2, first=first, length=30 - first)
    alone = entropy.row_entropy(query[:1, :, 11:], 2)
    assert torch.allclose(padded[:1], alone, atol=ENTROPY_TOLERANCE[torch.float32])
    assert torch.isfinite(padded).all()


def test_one_token_has_no_entropy(device):
    assert entropy.row_entropy(torch.randn(1, 2, 1, 8, device=device), 2).tolist() == [[0, 0]]


def test_elbow_without_a_bend_is_the_whole_spectrum():
    assert entropy.elbow([0.25] * 4) == 4
    assert entropy.elbow([0.4, 0.4, 0.2]) == 3  # lies above its chord
    assert entropy.elbow([0.5, 0.25, 0.0, 0.0]) == 3
    assert entropy.elbow([0.75, 0.25]) == 2


# ---- errors
def test_error_texts():
    query = torch.randn(1, 4, 9, 8)
    with pytest.raises(ValueError, match="rows must divide the query heads Hq = 4; got 3"):
        entropy.row_entropy(query, 3)
    with pytest.raises(ValueError, match="rows must divide the query heads Hq = 4; got 0"):
        entropy.row_entropy(query, 0)
    with pytest.raises(ValueError, match=r"top must lie in \[1, D = 8\]; got 9"):
        entropy.row_entropy(query, 4, top=9)
    with pytest.raises(ValueError, match=r"top must lie in \[1, D = 8\]; got 0"):
        entropy.row_entropy(query, 4, top=0)
    with pytest.raises(ValueError, match="kind must be one of truncated, renormalized, renyi2, variance; got 'renyi'"):
        entropy.row_entropy(query, 4, kind="renyi")
    with pytest.raises(ValueError, match="reduce must be one of mean, max; got 'sum'"):
        entropy.row_entropy(query, 2, reduce="sum")
    with pytest.raises(ValueError, match=r"query must have shape \[B, Hq, S, D\]; got \[4, 9, 8\]"):
        entropy.row_entropy(query[0], 4)
    with pytest.raises(ValueError, match="spectrum must hold two or more numbers and no NaN"):
        entropy.elbow([1.0, math.nan])
