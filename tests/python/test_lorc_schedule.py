# SPDX-License-Identifier: Apache-2.0
"""Ranks of the layers: worked vectors, exact means, order in depth, and configurations that are refused."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from uncomp.transforms.lorc.config import LorcConfig
from uncomp.transforms.lorc.schedule import Ranks, rank_schedule


def ranks(log_kappa, head_dim=128, **fields) -> Ranks:
    return rank_schedule(log_kappa, head_dim, LorcConfig(**fields))


# ---- worked by hand
def test_a_ramp_of_equal_condition_numbers():
    """Sums 4, 3, 2, 1 give t = 1, 2/3, 1/3, 0 and mean 1/2: from 32 to 32 + (64 - 32) * 2 = 96 in three equal steps."""
    expected = (96, 80, 48, 32)  # 96, 74.67, 53.33, 32: 6, 4, 3, 2 units and one more for the larger remainder
    assert ranks([1.0] * 4, rho=0.5).key == expected
    assert ranks([1.0] * 4, rho=0.5, schedule="linear").value == expected


def test_the_smallest_rank_rises_where_the_largest_would_exceed_the_head_dim():
    """Mean t 1/2 and rho 0.75: 32 + 64 * 2 = 160 > 128, so from 128 to 128 (0.75 - 0.5) / 0.5 = 64."""
    assert ranks([1.0] * 3, rho=0.75).key == (128, 96, 64)


def test_a_layer_with_a_large_condition_number_parts_shallow_from_deep():
    """ln kappa 0, 10, 0, 1 sums to 11, 11, 1, 1: two layers at t = 1, two at t = 0."""
    assert ranks([0.0, 10.0, 0.0, 1.0], rho=0.5).key == (96, 96, 32, 32)


def test_uniform_ranks_give_leftovers_to_shallow_layers():
    """0.575 of 128 is 73.6: over five layers 23 units of 16, four each and three left."""
    assert ranks([3.0, 1.0, 2.0, 5.0, 1.0], rho=0.575, schedule="uniform").key == (80, 80, 80, 64, 64)


def test_equal_condition_numbers_of_one_are_uniform():
    """All sums are 0: t is 1 everywhere by definition."""
    assert ranks([0.0] * 4, rho=0.5).key == (64,) * 4


def test_keys_and_values_have_shares_and_ranks_of_their_own():
    assert ranks([1.0] * 3, rho=(0.5, 0.75), schedule="uniform") == Ranks((64,) * 3, (96,) * 3)
    assert ranks([1.0] * 2, rank_k=32, rank_v=(64, 128)) == Ranks((32, 32), (64, 128))


def test_the_threshold_leaves_layers_whole_and_the_others_share_rho():
    """Sums 9, 4, 2: only layers within 3 of the last are cut."""
    found = ranks([5.0, 2.0, 2.0], rho=0.5, threshold=3.0)
    assert found.key[0] is None and found.value[0] is None
    assert sum(found.key[1:]) == 128


# ---- what holds for all of them
@pytest.mark.parametrize("schedule", ["cumulative_condition", "linear", "uniform"])
def test_the_mean_is_exact_and_ranks_fall_with_depth(schedule):
    draw = random.Random(0)
    for _ in range(300):
        count, dim = draw.randint(1, 80), 16 * draw.randint(4, 16)
        rho = round(draw.uniform(0.3, 1.0), 3)
        found = ranks([draw.uniform(0, 14) for _ in range(count)], dim, rho=rho, schedule=schedule).key
        assert sum(found) == 16 * math.floor(Fraction(str(rho)) * dim * count / 16 + Fraction(1, 2))
        assert list(found) == sorted(found, reverse=True)
        assert all(16 <= r <= dim and r % 16 == 0 for r in found)


def test_full_rank_is_full_in_every_layer():
    for schedule in ("cumulative_condition", "linear", "uniform"):
        assert ranks([1.0, 4.0, 2.0], rho=1.0, schedule=schedule).key == (128,) * 3


# ---- refusals
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rho": 0}, r"rho must be a share in \(0, 1\].*got 0"),
        ({"rho": 1.01}, r"rho must be a share in \(0, 1\].*got 1\.01"),
        ({"rho": True}, "rho must be a share"),
        ({"rho": float("nan")}, "rho must be a share"),
        ({"rho": (0.5, 0.5, 0.5)}, "rho must be a share .* or a pair"),
        ({"rho": 0.2}, r"rho must be at least d_min_frac \(0\.25\) for k; got 0\.2"),
        ({"d_min_frac": 0}, "d_min_frac must be a share"),
        ({"schedule": "ramp"}, "schedule must be one of 'cumulative_condition'"),
        ({"kappa": "head"}, "kappa must be one of"),
        ({"key_mode": "both"}, "key_mode must be one of"),
        ({"whiten": "yes"}, "whiten must be one of"),
        ({"exact_prefill": 1}, "exact_prefill must be True or False; got 1"),
        ({"granularity": "group:٣"}, 'granularity must be "head", "layer" or'),
        ({"svd": "randomised", "whiten": "calib"}, 'svd must be "exact" where whiten is given'),
        ({"rank_k": 24}, "rank_k must be a positive multiple of 16"),
        ({"rank_v": (16, 0)}, "rank_v must be a positive multiple of 16"),
        ({"threshold": -1}, "threshold must be a number of at least 0"),
        ({"rank_k": 16, "rank_v": 16, "threshold": 1}, "threshold must be left out"),
        ({"seed": -1}, "seed must be an integer"),
    ],
    ids=str,
)
def test_a_bad_field_is_named(fields, text):
    with pytest.raises(ValueError, match=f"^uncomp.LorcConfig: {text}"):
        LorcConfig(**fields)


@pytest.mark.parametrize(
    ("count", "dim", "fields", "text"),
    [
        (3, 72, {}, "head_dim must be a multiple of 16; got 72"),
        (3, 64, {"rank_k": 80}, "rank_k must be at most the head dim 64; got 80"),
        (3, 64, {"rank_v": (16, 32)}, "rank_v must have 3 ranks, one a compressed layer; got 2"),
        (3, 32, {"rho": 0.3}, r"rho must be at least 0\.5 for heads of 32 channels.*got 0\.3"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused(count, dim, fields, text):
    with pytest.raises(ValueError, match=f"^uncomp.*{text}"):
        ranks([1.0] * count, dim, **fields)


def test_a_config_comes_back_from_its_dict():
    config = LorcConfig(rho=(0.5, 0.75), rank_v=(16, 32), threshold=2.0)
    assert LorcConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown field ranks"):
        LorcConfig.from_dict({"ranks": 3})
