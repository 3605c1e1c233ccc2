# SPDX-License-Identifier: Apache-2.0
"""A batch stores for each prompt what the prompt alone would, under every policy, before or after the question."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import torch

import uncomp
from uncomp.eval import batch
from uncomp.eval.prompts import Prompt
from uncomp.eval.task import Task
from uncomp.testing import tiny_model

NEW = 5
POLICIES = {
    "full": {"budget": 1.0},
    "uncomp": {"budget": 48},
    "uncomp, share": {"budget": 0.3},
    "uncomp, tuned": {"budget": 48, "preset": "tuned"},
    "uncomp, grow": {"budget": 48, "decode": "grow"},
    "uncomp, deleted": {"budget": 48, "delete_heads": 1},
    "uncomp, pruned": {"budget": 48, "prefill": {"stages": [0, 2], "n_min": 0.6}},
    "adakv": {"budget": 48},
    "snapkv": {"budget": 48},
    "pyramidkv": {"budget": 48},
    "streaming_llm": {"budget": 48},
}


@pytest.fixture(scope="module")
def prompts():
    """Of three lengths, with questions of three lengths behind their contexts."""
    draw = torch.Generator().manual_seed(0)
    lengths = ((150, 9), (110, 12), (131, 10))
    return [Prompt(torch.randint(3, 199, (n,), generator=draw).tolist(), n - q, 0, [5, 6]) for n, q in lengths]


def outcomes(model, config, groups, agnostic):
    with uncomp.patch(model, config) as handle:
        made = [
            batch.run(model, handle, group, max_new_tokens=NEW, agnostic=agnostic, pad=0, eos=()) for group in groups
        ]
    return [outcome for group in made for outcome in group]


@pytest.mark.parametrize("agnostic", [False, True], ids=["aware", "agnostic"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_is_its_prompts_alone(model, device, prompts, name, agnostic):
    policy = name.split(",")[0]
    config = uncomp.UncompConfig(policy=policy, extend="append" if agnostic else "reselect", **POLICIES[name])
    together = outcomes(model, config, [prompts], agnostic)
    alone = outcomes(model, config, [[prompt] for prompt in prompts], agnostic)
    for prompt, one, other in zip(prompts, together, alone, strict=True):
        for field in ("context", "end"):
            assert getattr(one, field) == pytest.approx(getattr(other, field)), field
        assert {**one.bytes, "votes": 0} == {**other.bytes, "votes": 0}
        if device == "cpu":  # elsewhere sums of a batch may round otherwise
            assert (one.tokens, one.per_row, one.kept) == (other.tokens, other.per_row, other.kept)
        assert len(one.tokens) == NEW
        whole, behind = len(prompt.ids), len(prompt.ids) - prompt.boundary
        if policy == "full":
            assert one.end == whole + NEW - 1 and one.bytes["kv"] == one.bytes["full"] and one.kept is None
            assert one.context == (prompt.boundary if agnostic else None)
        elif POLICIES[name]["budget"] == 48:
            assert one.context == (48 if agnostic else None)
            stored = 48 + (behind if agnostic and name != "uncomp, deleted" else 0)
            if name == "uncomp, deleted":
                stored += 0.75 * behind if agnostic else 0  # one of four rows stores nothing
            assert one.end == stored + (NEW - 1 if name == "uncomp, grow" else 0)
            assert sum(map(sum, one.per_row)) / sum(map(len, one.per_row)) == stored


def test_a_text_that_ends_early_counts_its_own_tokens(prompts):
    """Its rows go on growing with the batch, which changes nothing that is told."""
    model = tiny_model("llama")
    with uncomp.patch(model, uncomp.UncompConfig(policy="full", budget=1.0)) as handle:
        free = batch.run(model, handle, prompts, max_new_tokens=NEW, agnostic=False, pad=0, eos=())
        last = free[0].tokens[1]
        ended = batch.run(model, handle, prompts, max_new_tokens=NEW, agnostic=False, pad=0, eos=(last,))
    for prompt, a, b in zip(prompts, free, ended, strict=True):
        length = a.tokens.index(last) + 1 if last in a.tokens else NEW
        assert b.tokens == a.tokens[:length]
        assert b.end == len(prompt.ids) + length - 1
        assert b.bytes["kv"] == b.bytes["full"]


# ---- layers with sliding windows, left uncompressed
@pytest.mark.parametrize("window", [16, 256], ids=["short window", "long window"])
@pytest.mark.parametrize("agnostic", [False, True], ids=["aware", "agnostic"])
def test_windows_hold_what_a_prompt_alone_would(prompts, window, agnostic):
    """Padding takes room in such a layer, and is counted for no prompt."""
    model = tiny_model("gemma3_text", sliding_window=window)
    even = [Prompt(prompt.ids, len(prompt.ids) - 9, 0, [5, 6]) for prompt in prompts]
    config = uncomp.UncompConfig(budget=48, skip_sliding=True, extend="append" if agnostic else "reselect")
    together = outcomes(model, config, [even], agnostic)
    alone = outcomes(model, config, [[prompt] for prompt in even], agnostic)
    for one, other in zip(together, alone, strict=True):
        assert (one.tokens, one.per_row, one.kept) == (other.tokens, other.per_row, other.kept)
        assert (one.bytes["kv"], one.bytes["full"]) == (other.bytes["kv"], other.bytes["full"])
        assert one.bytes["kv"] <= one.bytes["allocated"]


def test_questions_behind_windows_are_of_one_length(prompts):
    """Padding between context and question would push tokens out of a window."""
    model = tiny_model("gemma3_text")
    config = uncomp.UncompConfig(budget=48, skip_sliding=True, extend="append")
    with pytest.raises(ValueError, match=r"^uncomp\.eval: prompts must have as many ids .* got 9, 12, 10"):
        outcomes(model, config, [prompts], True)
    assert len(outcomes(model, config, [prompts], False)) == 3
    many = [*prompts, *prompts]
    task = SimpleNamespace(prompt=many.__getitem__, examples=[SimpleNamespace(max_new_tokens=NEW)] * len(many))
    assert list(Task.batches(task, range(6), 4, even=True)) == [[0, 3], [2, 5], [1, 4]]
    assert list(Task.batches(task, range(6), 4)) == [[0, 3, 2, 5], [1, 4]]
