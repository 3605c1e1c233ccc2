# SPDX-License-Identifier: Apache-2.0
"""random: numbers that hang on (seed, layer, row, position) alone."""

from __future__ import annotations

import torch
from policy_support import Run, chosen, shape_of

from uncomp import UncompConfig
from uncomp.scoring import uniform_numbers

MASK = (1 << 64) - 1


def mixed(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def lot(seed, layer, row, position):
    state = mixed((seed + 0x1E3779B97F4A7C15) & MASK)
    for number in (layer, row, position):
        state = mixed(((state ^ number) + 0x1E3779B97F4A7C15) & MASK)
    return (state >> 40) / (1 << 24)


def test_tokens_are_the_best_lots():
    config = UncompConfig(policy="random", budget=50, seed=7)
    run = Run(config, shape_of(config), [120, 40])
    for layer in range(3):
        want = [chosen([lot(7, layer, row, p) for p in range(120)], 120, 50, 8) for row in range(3)]
        assert run.kept(layer)[:3] == want
    assert run.kept(0)[:3] != run.kept(1)[:3] and run.kept(0)[0] != run.kept(0)[1]


def test_another_seed_is_another_lot():
    one, two = (Run(c, shape_of(c), [120]) for c in (UncompConfig(policy="random", budget=50, seed=s) for s in (1, 2)))
    assert one.kept(0) != two.kept(0)


def test_numbers_are_uniform():
    numbers = uniform_numbers(0, 3, torch.arange(8).unsqueeze(1), torch.arange(20000))
    assert numbers.dtype == torch.float32 and float(numbers.min()) >= 0 and float(numbers.max()) < 1
    share = torch.histc(numbers, 20, 0, 1) / numbers.numel()
    assert float((share - 0.05).abs().max()) < 0.003
    assert float(torch.corrcoef(numbers).fill_diagonal_(0).abs().max()) < 0.03
