# SPDX-License-Identifier: Apache-2.0
"""eval.perplexity: an uncompressed prefix gives the loss of a plain forward, and what is compared adds up."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import uncomp
from uncomp.eval.perplexity import score, windows
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def pieces():
    ids = torch.randint(3, 199, (400,), generator=torch.Generator().manual_seed(3))
    return windows(ids, prefix=150, continuation=20, count=1)[0]


@pytest.mark.parametrize("mode", ["stepwise", "chunk"])
@pytest.mark.parametrize("config", [None, uncomp.UncompConfig(policy="full"), uncomp.UncompConfig(budget=1.0)])
def test_nothing_lost_is_the_loss_of_a_forward(model, pieces, mode, config):
    prefix, continuation = pieces
    with torch.no_grad():
        logits = model(torch.cat(pieces, dim=1)).logits[0, 150:-1]
    wanted = torch.nn.functional.cross_entropy(logits, continuation[0, 1:])
    found = score(model, prefix, continuation, config, mode=mode)
    assert found.loss == pytest.approx(float(wanted), abs=1e-4)
    assert found.stored_tokens_mean == 150 and found.log_probs.shape == (19, 199)


@pytest.mark.parametrize("mode", ["stepwise", "chunk"])
def test_a_compressed_prefix(model, pieces, mode):
    """Stores the budget, differs from the full cache, gives the same twice, and leaves the model as it was."""
    full = score(model, *pieces, None, mode=mode)
    one, two = (score(model, *pieces, uncomp.UncompConfig(budget=24), mode=mode) for _ in range(2))
    assert one.stored_tokens_mean == 24
    assert one.loss == two.loss and torch.equal(one.log_probs, two.log_probs)
    assert one.divergence(full) > 1e-4 and abs(full.divergence(full)) < 1e-7
    assert full.agreement(full) == 1 >= one.agreement(full)
    assert score(model, *pieces, None, mode=mode).loss == full.loss


def test_windows():
    """Starts are floor(i (N - A - C) / (m - 1)): 0, 16, 33 and 50 of 100 tokens cut into 40 + 10."""
    found = windows(torch.arange(100), 40, 10, 4)
    assert [int(prefix[0, 0]) for prefix, _ in found] == [0, 16, 33, 50]
    assert all(p.shape == (1, 40) and c.shape == (1, 10) and c[0, 0] == p[0, -1] + 1 for p, c in found)
    assert [int(p[0, 0]) for p, _ in windows(torch.arange(50), 40, 10, 1)] == [0]
    with pytest.raises(ValueError, match=r"^uncomp.eval: ids must be at least 50 tokens; got 49"):
        windows(torch.arange(49), 40, 10, 1)
    with pytest.raises(ValueError, match=r"continuation 2; got 40, 1, 1"):
        windows(torch.arange(100), 40, 10, 1) and windows(torch.arange(100), 40, 1, 1)


def test_bad_input(model, pieces):
    prefix, continuation = pieces
    with pytest.raises(ValueError, match=r"^uncomp.eval: mode must be one of stepwise, chunk; got 'all'"):
        score(model, prefix, continuation, None, mode="all")
    with pytest.raises(
        ValueError, match=r"^uncomp.eval: continuation must be \[1, 2 or more\] token ids; got \[1, 1\]"
    ):
        score(model, prefix, continuation[:, :1], None)
    with pytest.raises(ValueError, match=r"^uncomp.eval: prefix must be"):
        score(model, prefix[0], continuation, None)
