# SPDX-License-Identifier: Apache-2.0
"""presets: published budgets are what they were published as, and their own limits."""

from fractions import Fraction

import pytest
import torch

from uncomp import UncompConfig, budget, presets
from uncomp.grouping import group_sizes, labels

PUBLISHED = {  # lowest entropy first, and the mean over 32 rows
    "g2": ([256, 512], 384),
    "g2-64": ([43, 86], 64.5),
    "g2-wide": ([240, 528], 384),
    "g2-wider": ([128, 640], 384),
    "g2-ref(512)": ([384, 768], 576),
    "g2-ref(86)": ([16, 112], 64),
    "g2-ref(85)": ([63, 127], 95),
    "g4-ref(512)": ([257, 342, 427, 512], 384.5),
    "extreme-ref(12, 512)": ([12, 512], 262),
    "extreme-ref(128)": ([128, 512], 320),
    "g3": ([32, 384, 736], 384),
    "g3.1": ([192, 384, 576], 384),
    "g3.2": ([128, 384, 640], 384),
    "g3.3": ([64, 384, 704], 384),
    "g4": ([128, 298, 470, 640], 384),
    "g5": ([256, 320, 384, 448, 512], 384),
    "g5.1": ([128, 256, 384, 512, 640], 384),
    "g8": ([20, 128, 256, 384, 384, 512, 640, 748], 384),
    "g8.0": ([32, 132, 232, 334, 434, 534, 635, 736], 383.625),
    "g8.1": ([129, 202, 275, 348, 421, 494, 567, 640], 384.5),
    "g8.2": ([64, 158, 249, 340, 431, 522, 613, 704], 385.125),
    "g8.3": ([32, 132, 232, 334, 434, 534, 635, 736], 383.625),
    "g8.4": ([320, 340, 358, 376, 394, 412, 430, 448], 384.75),
    "g3-64": ([16, 64, 112], 64),
    "g3-64.1": ([12, 64, 116], 64),
    "g4-64": ([16, 48, 80, 112], 64),
    "g4-64.1": ([12, 47, 81, 116], 64),
    "g5-64": ([16, 40, 64, 88, 112], 64),
    "g5-64.1": ([12, 38, 64, 90, 116], 64),
    "g8-64": ([16, 30, 44, 64, 64, 84, 98, 112], 64),
    "g8-64.1": ([12, 27, 42, 56, 72, 86, 101, 116], 64),
    "g32": (list(range(144, 641, 16)), 392),
    "g32-mixed": ([128, 640], 384),
    "linear(640, 74, 8)": ([122, 196, 270, 344, 418, 492, 566, 640], 381),
    "linear(640,74,8)": ([122, 196, 270, 344, 418, 492, 566, 640], 381),
    "linear(100, 0, 1)": ([100], 100),
}


def limits(shape, rows, n, floor=8, layer=0, num_layers=32):
    weights = shape.weights(layer, num_layers, n)
    total = shape.total(rows, floor, layer, num_layers, n)
    group = torch.tensor([labels(rows, len(weights))], dtype=torch.int32)
    return budget.limits(group, weights, n, total, floor)[0].tolist()


# ---- values
@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_their_own_limits(name):
    # T = sum of size * value, so every row gets its group's value; in floats 418 would become 417.
    values, mean = PUBLISHED[name]
    shape = presets.preset(name, 32)
    assert shape.tokens(0, 32) == values
    assert Fraction(shape.total(32, 8, 0, 32), 32) == mean
    assert limits(shape, 32, 8192) == [values[g] for g in labels(32, len(values))]
    assert limits(shape, 40, 8192) == [values[g] for g in labels(40, len(values))]


def test_every_name_is_tested():
    rules = {name.split("(")[0] for name in PUBLISHED if "(" in name}
    assert set(PUBLISHED) - {n for n in PUBLISHED if "(" in n} | {"g32-stream"} == set(presets.PRESETS)
    assert {n.split("(")[0] for n in presets.names()} == rules | set(presets.PRESETS)


def test_stream_keeps_the_whole_prompt_in_the_highest_row():
    shape = presets.preset("g32-stream", 32)
    for n in (21, 500, 5000):
        assert limits(shape, 32, n) == [20] * 31 + [n]
    with pytest.raises(ValueError, match="g32-stream keeps all prompt tokens of a group, so n is needed; got None"):
        shape.tokens(0, 32)


def test_stream_on_a_short_prompt_still_has_a_floor():
    # 31 * 20 + 40 tokens do not hold 32 rows of 32; the total is raised.
    assert limits(presets.preset("g32-stream"), 32, 40, floor=32) == [32] * 32
    assert sum(limits(presets.preset("g32-stream"), 32, 0)) == 31 * 20 + 1


def test_mixed_layers():
    shape = presets.preset("g32-mixed", 32)
    outer = [layer for layer in range(32) if shape.tokens(layer, 32) == [128, 640]]
    assert outer == [*range(8), *range(24, 32)]
    assert all(shape.tokens(layer, 32) == [384] and shape.weights(layer, 32) == [1] for layer in range(8, 24))
    assert limits(shape, 32, 4096, layer=12) == [384] * 32


def test_a_preset_with_a_budget_gives_proportions():
    weights = presets.preset("g2-wider").weights(0, 32)
    assert weights == [1, 5]
    group = torch.tensor([labels(8, 2)], dtype=torch.int32)
    assert budget.limits(group, weights, 4096, 8 * 60, 8)[0].tolist() == [20] * 4 + [100] * 4


def test_values_of_the_reference_under_a_pyramid():
    assert presets.pyramid_ref(2, 384) == [96, 480]
    assert presets.pyramid_ref(3, 385) == [192, 288, 385]
    assert presets.pyramid_ref(4, 384) == [96, 224, 352, 480]
    assert presets.pyramid_ref(4, 24) == [9, 18, 18, 27]  # u = 2: 3 u is less than 8
    assert presets.pyramid_ref(8, 384) == [91, 143, 195, 247, 329, 381, 433, 485]
    assert presets.pyramid_ref(8, 55) == [9] * 4 + [73] * 4  # u = 1
    many = presets.pyramid_ref(32, 124)  # c = 186, u = 1
    assert many == [31 + 4 * i for i in range(32)]


# ---- errors
def test_an_unknown_name_says_what_exists():
    with pytest.raises(ValueError) as error:
        presets.preset("g9")
    text = str(error.value)
    assert text.startswith("uncomp.presets: shape must be one of g2, g2-64,") and text.endswith("; got 'g9'")
    for name in presets.names():
        assert name in text
    for name in ("", "linear", "linear(640, 74, 8", "g2(3)", "G2"):
        with pytest.raises(ValueError, match="shape must be one of"):
            presets.preset(name)


@pytest.mark.parametrize("name", ["linear(640, 74)", "linear()", "linear(640, 74, 8, 1)", "linear(640,,8)"])
def test_wrong_numbers_are_refused(name):
    with pytest.raises(ValueError, match=r"linear takes \(top, step, G\) as whole numbers; got"):
        presets.preset(name)


@pytest.mark.parametrize("name", ["linear(100, 100, 2)", "extreme-ref(600, 512)", "g2-ref(0)", "linear(9, 1, 0)"])
def test_values_must_be_positive_and_rise(name):
    with pytest.raises(ValueError, match="values must be positive and must not fall"):
        presets.preset(name)


def test_more_groups_than_rows_are_refused():
    with pytest.raises(ValueError, match="g8 has 8 groups and needs as many rows; got 4"):
        presets.preset("g8", 4)
    with pytest.raises(ValueError, match=r"linear\(640, 74, 8\) has 8 groups"):
        presets.preset("linear(640, 74, 8)", 7)
    with pytest.raises(ValueError, match=r"num_groups must lie in \[1, rows = 4\]; got 8"):
        presets.preset("g8").total(4, 8, 0, 32)
    assert len(group_sizes(8, len(presets.preset("g8", 8).values))) == 8


def test_a_preset_below_the_floor_is_refused():
    with pytest.raises(ValueError, match=r"g8-64 must hold rows \* \(window \+ sinks\) = 2080 tokens; got 2048"):
        presets.preset("g8-64").total(32, 65, 0, 32)


def test_the_reference_has_no_other_pyramids():
    with pytest.raises(ValueError, match="pyramid for 2, 3, 4, 8 or 32 groups; got 5"):
        presets.pyramid_ref(5, 384)


def test_equal_configs_have_one_hash():
    for options in ({}, {"policy": "adakv", "policy_options": {"alpha": 0.3}}, {"policy": "uncomp_stage"}):
        config = UncompConfig(**options)
        again = UncompConfig.from_dict(config.to_dict())
        assert config == again
        assert hash(config) == hash(again)
    assert UncompConfig(budget=40) in {UncompConfig(budget=40): 1}
