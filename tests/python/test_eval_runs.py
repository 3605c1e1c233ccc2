# SPDX-License-Identifier: Apache-2.0
"""What is written behind --policy and --budget becomes the runs that were meant."""

from __future__ import annotations

import pytest

from uncomp.eval.runs import RANDOM_SEEDS, parse_policy, plan


def test_fields_of_a_policy():
    name, fields = parse_policy("uncomp:groups=8,order=random,shape=512+256,value_norm=true,spread=2/3,profile=a.json")
    assert name == "uncomp"
    assert fields == {
        "groups": 8, "order": "random", "shape": (512, 256), "value_norm": True, "spread": "2/3", "profile": "a.json",
    }  # fmt: skip
    assert parse_policy("adakv:options.alpha=0.3") == ("adakv", {"policy_options": {"alpha": 0.3}})
    pruned = parse_policy("uncomp:prefill.stages=0+2,prefill.n_min=0.5")[1]
    assert pruned == {"prefill": {"stages": (0, 2), "n_min": 0.5}}
    assert plan(["uncomp:prefill.stages=0+2,prefill.n_min=0.5"], [64], ["aware"], seed=1)[0].config.prefill.n_min == 0.5
    assert parse_policy("snapkv") == ("snapkv", {})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("uncomp:groups", "--policy must be NAME:field=value"),
        ("uncomp:prefill=3", "unknown field prefill; known: rows,"),
        ("uncomp:budget=3", "unknown field budget; known: rows,"),
        ("uncomp:groups=2,groups=4", "uncomp:groups=2,groups=4 names groups twice"),
        ("uncomp:groups=2,", "must be NAME:field=value"),
        ("uncomp:", "must be NAME:field=value"),
        ("uncomp:value_norm=maybe", "field value_norm must be true or false; got maybe"),
    ],
)
def test_fields_that_cannot_be(text, wanted):
    with pytest.raises(ValueError, match=rf"^uncomp eval: .*{wanted}"):
        parse_policy(text)


def test_policies_times_budgets_times_modes():
    runs = plan(["snapkv", "full", "uncomp:groups=4"], [64, 0.5], ["aware", "agnostic"], seed=7)
    assert [run.name for run in runs] == [
        "full-full-aware", "full-full-agnostic",
        "snapkv-64-aware", "snapkv-64-agnostic",
        "uncomp_groups_4-64-aware", "uncomp_groups_4-64-agnostic",
        "snapkv-0.5-aware", "snapkv-0.5-agnostic",
        "uncomp_groups_4-0.5-aware", "uncomp_groups_4-0.5-agnostic",
    ]  # fmt: skip
    assert {run.config.extend for run in runs if run.mode == "agnostic"} == {"append"}
    assert {run.config.extend for run in runs if run.mode == "aware"} == {"reselect"}
    assert {run.config.seed for run in runs} == {7} and runs[0].config.keeps_all


def test_what_holds_for_all():
    runs = plan(["full", "snapkv", "uncomp"], [64], ["aware"], seed=1, shared={"window": 16, "decode": "grow"})
    assert [run.config.window for run in runs[1:]] == [16, 16]
    assert [run.config.decode for run in runs] == ["grow"] * 3
    assert runs[0].config.window == plan(["full"], [64], ["aware"], seed=1)[0].config.window


def test_what_a_policy_names_itself():
    """Stands where no option holds for all, and is never overruled in silence."""
    assert plan(["uncomp:decode=grow"], [64], ["aware"], seed=1)[0].config.decode == "grow"
    with pytest.raises(ValueError, match=r"^uncomp eval: --policy uncomp:decode=grow and --decode evict differ"):
        plan(["uncomp:decode=grow"], [64], ["aware"], seed=1, shared={"decode": "evict"})
    with pytest.raises(ValueError, match=r"^uncomp eval: --policy snapkv:pool_width=5 and --pool-width 7 differ"):
        plan(["snapkv:pool_width=5"], [64], ["aware"], seed=1, shared={"pool_width": 7})


def test_standard_is_what_every_table_names():
    runs = plan(["standard"], [64], ["aware"], seed=1)
    assert [run.config.policy for run in runs] == ["full", "streaming_llm", "snapkv", "pyramidkv", "adakv"] + [
        "uncomp"
    ] * 6
    drawn = runs[6:]
    assert {run.config.order for run in drawn} == {"random"}
    assert [run.config.seed for run in drawn] == list(range(RANDOM_SEEDS))


def test_a_run_twice_is_refused():
    with pytest.raises(ValueError, match=r"^uncomp eval: policies and budgets give the run snapkv-64-aware twice"):
        plan(["snapkv", "snapkv"], [64], ["aware"], seed=1)
