# SPDX-License-Identifier: Apache-2.0
"""pyramidkv: budgets of the layers, and SnapKV's tokens inside them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from policy_support import Run, by_row, chosen, pooled, shape_of, weights

from uncomp import UncompConfig
from uncomp.policies import make_policy


def pyramid(b, n, layers, window, beta):
    """Means of the layers: shares of a falling line, whole parts, then the largest fractions from the first layer."""
    spare = Fraction(b - window)
    if n < 2 * spare:
        return [b] * layers
    low = spare / beta
    high = 2 * spare - low
    if high >= n - window:
        high, low = Fraction(n - window), 2 * spare - (n - window)
    line = [window + high - layer * (high - low) / (layers - 1) for layer in range(layers)]
    whole = [int(x) for x in line]
    for layer in sorted(range(layers), key=lambda i: (whole[i] - line[i], i))[: layers * b - sum(whole)]:
        whole[layer] += 1
    return whole


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
@pytest.mark.parametrize("n", [200, 110, 75, 30])
@pytest.mark.parametrize("beta", [20, 3])
def test_budgets_and_tokens(rows, n, beta):
    config = UncompConfig(policy="pyramidkv", budget=50, rows=rows, policy_options={"beta": beta})
    shape = shape_of(config, layers=4)
    run = Run(config, shape, [n])
    means = pyramid(50, n, 4, 8, beta)
    assert sum(means) == 200
    for layer, mean in enumerate(means):
        assert run.layers[layer].limit.tolist() == [[mean] * shape.rows]
        scores = by_row(weights(run.stories[0], layer, n)[:, -8:].sum(1), shape.rows)
        assert run.kept(layer) == [chosen(pooled(s[: n - 8], 7), n, mean, 8) for s in scores]


def test_known_budgets():
    """b = 384, W = 8, beta = 20, 32 layers: 18.8 tokens above the window at the top, 733.2 at the bottom."""
    config = UncompConfig(policy="pyramidkv")
    policy = make_policy(config, shape_of(config, layers=32, q_heads=8, kv_heads=8))
    means = [policy.totals(layer, [8192])[0] // 8 for layer in range(32)]
    assert (means[0], means[-1], sum(means)) == (741, 27, 32 * 384)
    assert means == sorted(means, reverse=True)
    assert [policy.totals(layer, [700, 300])[0] // 8 for layer in range(32)] == [384] * 32  # shorter than 2 (b - W)


def test_beta_is_checked():
    for beta in (0.5, "20", True):
        config = UncompConfig(policy="pyramidkv", policy_options={"beta": beta})
        with pytest.raises(ValueError, match="beta of pyramidkv must be at least 1"):
            make_policy(config, shape_of(config))
