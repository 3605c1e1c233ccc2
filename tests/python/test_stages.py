# SPDX-License-Identifier: Apache-2.0
"""stages: two published curves give the published stages and tokens; what a curve cannot have is refused."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncomp import stages

CURVE_7B = [
    *(71.0945, 70.8513, 67.4061, 69.0495, 69.2233, 69.5153, 71.9600, 73.1487, 72.3999, 73.3316, 73.3457, 73.3248),
    *(73.6864, 73.9357, 74.6176, 73.3068, 73.6028, 73.9147, 73.9061, 74.6280, 74.4647, 74.7673, 74.9438, 75.7233),
    *(74.8384, 76.9966, 75.5983, 76.2434, 76.6184, 75.7592, 75.2775, 73.4452),
]
CURVE_13B = [
    *(88.5614, 83.1909, 84.3841, 83.2164, 86.9225, 87.5377, 89.1819, 89.1904, 89.9533, 90.9660, 91.8634, 92.5188),
    *(92.0397, 92.4652, 93.2051, 91.4241, 92.6419, 93.0082, 92.9807, 93.1638, 93.3794, 93.1162, 94.1669, 93.0862),
    *(92.5823, 92.8797, 93.1111, 94.1943, 94.1634, 94.6436, 96.2682, 94.7749, 95.5891, 95.2201, 95.3173, 94.1931),
    *(95.2864, 92.5082, 92.2005, 92.1414),
]
PUBLISHED = [
    (0.3, [0, 2, 8, 15, 24, 26, 29, 30, 31], [0, 1, 3, 12, 15, 23, 24, 31, 33, 35, 37, 38]),
    (0.5, [0, 2, 8, 15, 24, 26, 29, 31], [0, 1, 3, 15, 23, 24, 31, 35, 37]),
    (0.75, [0, 2, 15, 24, 26, 29, 31], [0, 1, 3, 15, 23, 31, 35, 37]),
    (1, [0, 2, 15, 26, 31], [0, 1, 3, 15, 23, 31, 35, 37]),
    (1.25, [0, 2, 15, 26, 31], [0, 1, 15, 31, 37]),
    (1.5, [0, 2, 31], [0, 1, 15, 37]),
    (2, [0, 2], [0, 1, 37]),
    (4, [0], [0, 1]),
    (6, [0], [0]),
]


# ---- values
@pytest.mark.parametrize(("threshold", "small", "large"), PUBLISHED)
def test_published_stages_at_every_threshold(threshold, small, large):
    assert stages.stage_starts(CURVE_7B, threshold) == small
    assert stages.stage_starts(CURVE_13B, threshold) == large


def test_sizes_of_published_stages():
    assert stages.stage_sizes([0, 2, 15, 26, 31], 32) == [2, 13, 11, 5, 1]
    assert stages.stage_sizes([0, 1, 3, 15, 23, 31, 35, 37], 40) == [1, 2, 12, 8, 8, 4, 2, 3]
    assert stages.stage_of_layer([0, 2, 3], 5) == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("starts", "layers", "n", "first", "tokens", "linear", "square"),
    [
        ([0, 2, 15, 26, 31], 32, 4096, 4096, [3456, 2816, 2176, 1536], 0.736, 0.563),
        ([0, 2, 15, 26, 31], 32, 8192, 8192, [6528, 4864, 3200, 1536], 0.657, 0.467),
        ([0, 1, 3, 15, 23, 31, 35, 37], 40, 4096, 4091, [3726, 3361, 2996, 2631, 2266, 1901, 1536], 0.698, 0.510),
    ],
)
def test_published_tokens_and_work(starts, layers, n, first, tokens, linear, square):
    """Stage 0 keeps its n tokens; the reference cuts it to the first number."""
    assert stages.stage_tokens(n, len(starts)) == [n, *tokens]
    assert stages.stage_tokens(n, len(starts), prune_first=True) == [first, *tokens]
    work = stages.kept_work(starts, layers, [n, *tokens], n)
    assert work == (pytest.approx(linear, abs=5e-4), pytest.approx(square, abs=5e-4))


@pytest.mark.parametrize(
    ("n", "tokens"),
    [
        (3000, [3000, 2634, 2268, 1902, 1536]),
        (2000, [2000, 1884, 1768, 1652, 1536]),
        (32768, [32768, 24960, 17152, 9344, 1536]),
        (1536, [1536] * 5),
        (10, [10] * 5),
        (0, [0] * 5),
    ],
)
def test_tokens_of_other_prompts(n, tokens):
    assert stages.stage_tokens(n, 5) == tokens


def test_tokens_as_shares_numbers_and_steps():
    assert stages.stage_tokens(1000, 3, n_min=0.2) == [1000, 600, 200]
    assert stages.stage_tokens(1000, 3, n_max=0.5, n_min=0.1) == [1000, 300, 100]
    assert stages.stage_tokens(1005, 2, n_min=0.1) == [1005, 101]  # 100.5 is rounded up, as its decimals say
    assert stages.stage_tokens(8192, 3, n_max=4096) == [8192, 2816, 1536]
    assert stages.stage_tokens(3000, 5, n_max=4096) == [3000, 3000, 2816, 2176, 1536]  # no more than arrive
    assert stages.stage_tokens(4096, 8, n_step=512) == [4096, 3584, 3072, 2560, 2048, 1536, 1536, 1536]
    assert stages.stage_tokens(100, 3, n_min=2, floor=24) == [100, 51, 24]
    assert stages.stage_tokens(100, 1) == stages.stage_tokens(100, 1, n_min=5) == [100]
    assert stages.stage_tokens(5000, 3, n_max=1000) == [5000] * 3


def test_curves_of_entropies():
    assert stages.layer_curve([[0.0, 1.0], [0.5, 0.5]]) == pytest.approx([1 + math.e, 2 * math.exp(0.5)])
    assert stages.rank_curve([[0.0, 1.0], [0.5, 0.5]], 16) == pytest.approx([8.5, 4.0])
    assert stages.default_threshold(14) == 14 / 32 and stages.default_threshold(40) == 1.0


def test_retrieval_layer_of_the_published_curves():
    assert (stages.retrieval_layer(CURVE_7B), stages.retrieval_layer(CURVE_13B)) == (6, 4)
    assert stages.retrieval_layer([0, 2, 4, 100]) == 1  # the last layer is none, a tie goes to the lower
    assert stages.retrieval_layer([9, 8, 7]) == 1


@pytest.mark.parametrize("curve", [CURVE_7B, CURVE_13B])
def test_threshold_of_every_number_of_stages(curve):
    falls = sum(a > b for a, b in pairwise(curve))
    for wanted in range(1, falls + 2):
        threshold = stages.find_threshold(curve, wanted)
        assert len(stages.stage_starts(curve, threshold)) == wanted
        below = threshold - 1e-6  # it is the smallest one
        assert below < 0 or len(stages.stage_starts(curve, below)) > wanted
    with pytest.raises(ValueError, match=f"num_stages must be one of 1, .* for this curve; got {falls + 2}"):
        stages.find_threshold(curve, falls + 2)


# ---- edges
def test_small_curves():
    assert stages.stage_starts([], 1) == []
    assert stages.stage_starts([5.0], 0) == [0]
    assert stages.stage_starts([1, 2, 3], 0) == [0]  # rises never split
    assert stages.find_threshold([5.0], 1) == 0.0
    with pytest.raises(ValueError, match=r"one of 1, 3 for this curve; got 2"):
        stages.find_threshold([4, 3, 2], 2)  # equal drops split together


@given(
    st.integers(0, 5000),
    st.integers(1, 9),
    st.one_of(st.integers(1, 4000), st.floats(0.001, 1)),
    st.one_of(st.none(), st.integers(1, 700)),
)
def test_tokens_never_rise_and_never_fall_below_the_floor(n, num_stages, n_min, n_step):
    tokens = stages.stage_tokens(n, num_stages, n_min=n_min, n_step=n_step, floor=24)
    assert len(tokens) == num_stages and tokens[0] == n
    assert tokens == sorted(tokens, reverse=True) and tokens[-1] >= min(n, 24)


# ---- errors
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: stages.stage_starts([1.0, math.nan], 1), "curve must hold finite numbers; got nan at layer 1"),
        (lambda: stages.stage_starts([1.0], -1), "threshold must be at least 0; got -1"),
        (lambda: stages.stage_starts([1.0], math.nan), "threshold must be at least 0; got nan"),
        (lambda: stages.find_threshold([], 1), "curve must have at least one layer"),
        (lambda: stages.check_starts([1, 2], 4), r"stages must ascend from 0 to below 4 layers; got \[1, 2\]"),
        (lambda: stages.check_starts([0, 2, 2], 4), "stages must ascend"),
        (lambda: stages.check_starts([0, 4], 4), "stages must ascend"),
        (lambda: stages.check_starts([], 4), "stages must ascend"),
        (lambda: stages.stage_tokens(-1, 2), "n must be an integer of at least 0; got -1"),
        (lambda: stages.stage_tokens(9, 0), "num_stages must be an integer of at least 1; got 0"),
        (lambda: stages.stage_tokens(9, 2, n_min=0), "n_min must be tokens .* or a share .*; got 0"),
        (lambda: stages.stage_tokens(9, 2, n_max=1.5), "n_max must be tokens .*; got 1.5"),
        (lambda: stages.stage_tokens(9, 2, n_max="all"), "n_max must be tokens .*; got 'all'"),
        (lambda: stages.stage_tokens(9, 2, n_step=0), "n_step must be an integer of at least 1; got 0"),
        (lambda: stages.kept_work([0, 1], 4, [9], 9), "tokens must hold 2 numbers"),
        (lambda: stages.retrieval_layer([1, 2]), "curve must have at least 3 layers; got 2"),
        (lambda: stages.rank_curve([[0.1]], 1), "head_dim must be at least 2; got 1"),
        (lambda: stages.rank_curve([[]], 8), "entropy must hold at least one head in every layer"),
        (
            lambda: stages.rank_curve([[0.5], [3.5]], 8),
            "entropy must lie in .0, 1., shares of ln D; got 3.5 at layer 1",
        ),
        (lambda: stages.default_threshold(0), "num_q_heads must be at least 1; got 0"),
    ],
)
def test_error_texts(call, text):
    with pytest.raises(ValueError, match=f"^uncomp.stages: {text}"):
        call()
