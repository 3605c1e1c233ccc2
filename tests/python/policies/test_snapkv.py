# SPDX-License-Identifier: Apache-2.0
"""snapkv against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from policy_support import Run, Story, best, by_row, chosen, pooled, shape_of, weights

from uncomp import UncompConfig
from uncomp.scoring import pool_scores


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_chosen_tokens(rows, pool):
    config = UncompConfig(policy="snapkv", budget=60, rows=rows, pool=pool)
    assert (config.window, config.pool_width, config.vote_window) == (32, 7, 8)
    shape, n = shape_of(config), 140
    run = Run(config, shape, [n])
    for layer in range(shape.num_layers):
        scores = by_row(weights(run.stories[0], layer, n)[:, -32:].sum(1), shape.rows)
        want = [chosen(pooled(s[: n - 32], 7, pool), n, 60, 32) for s in scores]
        assert run.kept(layer) == want


def test_one_head_decides_with_max():
    config = UncompConfig(policy="snapkv", budget=40, reduce_scores="max", pool_width=1, sinks=2)
    shape, n = shape_of(config), 120
    run = Run(config, shape, [n])
    scores = weights(run.stories[0], 1, n)[:, -32:].sum(1).view(shape.rows, -1, n).amax(1)
    assert run.kept(1) == [chosen(s, n, 40, 32, sinks=2) for s in scores]


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("width", [1, 3, 7, 129])
def test_pooling_is_that_of_the_selection(mode, width):
    """Where pooled scores are given to an unpooled selection, it chooses the same tokens, bit for bit."""
    from uncomp import ops

    made = torch.Generator().manual_seed(width)
    scores = torch.randn(5, 90, generator=made)
    scores[torch.rand(5, 90, generator=made) < 0.1] = float("nan")
    length = torch.tensor([90, 61, 20, 7, 0], dtype=torch.int32)
    keep = torch.tensor([30, 25, 12, 7, 0], dtype=torch.int32)
    flat = pool_scores(scores, length, width, mode, exclude_last=5)
    assert flat.isnan()[torch.arange(90) >= (length - 5).unsqueeze(1)].all()
    want, _ = ops.select_tokens(scores, length, keep, int(keep.sum()), sink=2, window=5, pool=width, pool_mode=mode)
    got, _ = ops.select_tokens(flat, length, keep, int(keep.sum()), sink=2, window=5, pool=1)
    assert torch.equal(got, want)


def test_pooling_says_what_it_takes():
    one = torch.zeros(1, 4), torch.tensor([4], dtype=torch.int32)
    with pytest.raises(ValueError, match="width must be odd and at least 1; got 2"):
        pool_scores(*one, 2)
    with pytest.raises(ValueError, match="mode must be one of 'max', 'avg'; got 'min'"):
        pool_scores(*one, 3, "min")


def test_the_references_choose_by_rule():
    assert best([1, 3, 3, 0], 2, 0, 4) == [1, 2] and best([1, 3, 3, 0], 1, 0, 4) == [1]
    shape = shape_of(UncompConfig(policy="snapkv"))
    assert torch.allclose(weights(Story(0, shape), 0, 9).sum(-1), torch.ones(6, 9, dtype=torch.float64))
