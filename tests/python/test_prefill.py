# SPDX-License-Identifier: Apache-2.0
"""PrefillPruning: what it takes, what it refuses by name, and how a configuration carries it."""

from __future__ import annotations

import pytest

from uncomp import PrefillPruning, UncompConfig


def test_defaults_are_the_published_ones():
    options = PrefillPruning()
    assert (options.stages, options.n_min, options.n_max, options.n_step) == ("profile", 1536, "prompt", None)
    assert (options.hidden_queries, options.prune_first) == (8, False)
    assert UncompConfig().prefill is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stages": [0, 2, 15], "n_min": 0.25, "n_max": 4096},
        {"stages": "fixed", "n_step": 512, "prune_first": True, "hidden_queries": 1},
        {"profile": "smollm2-135m", "curve": "erank", "threshold": 0.3},
        {"num_stages": 4},
    ],
    ids=str,
)
def test_a_saved_configuration_is_the_same(options, tmp_path):
    config = UncompConfig(prefill=PrefillPruning(**options))
    config.save_pretrained(tmp_path)
    assert UncompConfig.from_pretrained(tmp_path) == config
    assert UncompConfig.from_dict(UncompConfig().to_dict()).prefill is None


def test_the_name_of_the_paper_turns_it_on():
    assert UncompConfig(policy="uncomp_stage").prefill == PrefillPruning()
    given = PrefillPruning(stages=[0, 1])
    assert UncompConfig(policy="uncomp_stage", prefill=given).prefill == given
    assert UncompConfig(policy="uncomp_stage", shape="g8").budget is None  # named shapes carry their limits
    assert given.stages == (0, 1)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"stages": "online"}, 'stages must be "profile", "fixed" or ascending layers from 0; got \'online\''),
        ({"stages": []}, "stages must be"),
        ({"stages": [1, 2]}, r"stages must be .*; got \(1, 2\)"),
        ({"stages": [0, 3, 2]}, r"ascending layers from 0; got \(0, 3, 2\)"),
        ({"stages": [0, 2, 2]}, "ascending"),
        ({"stages": [0, 1.5]}, "ascending"),
        ({"stages": [False, 1]}, "ascending"),
        ({"stages": None}, "ascending"),
        ({"n_min": 0}, r"n_min must be tokens \(an integer from 1\) or a share \(a float in \(0, 1\]\); got 0"),
        ({"n_min": 1.5}, "n_min must be tokens"),
        ({"n_min": "prompt"}, "n_min must be tokens"),
        ({"n_min": True}, "n_min must be tokens"),
        ({"n_max": 0.0}, r'n_max must be tokens .* or "prompt"; got 0\.0'),
        ({"n_max": "all"}, "n_max must be tokens"),
        ({"n_min": 2000, "n_max": 1999}, r"n_min must be at most n_max \(1999\); got 2000"),
        ({"n_min": 0.5, "n_max": 0.25}, "n_min must be at most n_max"),
        ({"n_step": 0}, "n_step must be at least 1 token"),
        ({"n_step": 2.0}, "n_step must be"),
        ({"hidden_queries": 0}, "hidden_queries must be 1 to 64 queries; got 0"),
        ({"hidden_queries": 65}, "hidden_queries must be"),
        ({"prune_first": 1}, "prune_first must be True or False"),
        ({"curve": "sum"}, "curve must be one of 'entropy', 'erank'"),
        ({"curve": "erank"}, "threshold must be given, or num_stages"),
        ({"threshold": -1}, "threshold must be a drop of at least 0"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"threshold": 1.0, "num_stages": 2}, "num_stages must be left out where threshold is given"),
        ({"num_stages": 0}, "num_stages must be at least 1"),
        ({"profile": ""}, "profile must be the path"),
        ({"stages": [0, 1], "threshold": 1.0}, 'threshold must be left out where stages is not "profile"'),
        ({"stages": "fixed", "profile": "a.json"}, "profile must be left out"),
    ],
    ids=str,
)
def test_refusals(options, wanted):
    with pytest.raises(ValueError, match=rf"^uncomp\.PrefillPruning: .*{wanted}"):
        PrefillPruning(**options)


def test_a_configuration_refuses_anything_else():
    with pytest.raises(ValueError, match=r"uncomp\.UncompConfig: prefill must be a PrefillPruning or None; got True"):
        UncompConfig(prefill=True)
    with pytest.raises(ValueError, match=r"uncomp\.PrefillPruning: unknown field n_low; known: curve"):
        UncompConfig(prefill={"n_low": 3})
