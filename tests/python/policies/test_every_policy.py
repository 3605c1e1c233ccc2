# SPDX-License-Identifier: Apache-2.0
"""What every registered policy keeps to, on bare tensors; a new policy is tested by being registered."""

from __future__ import annotations

import pytest
import torch
from policy_support import Run, Story, shape_of

from uncomp import UncompConfig, known_policies
from uncomp.budget import mean_tokens

ROWS = ("kv_head", "query_head")
BUDGETS = (48, 0.5, 1.0)
LENGTHS = (150, 97, 40, 5, 1)
every_policy = pytest.mark.parametrize("policy", known_policies())
every_rows = pytest.mark.parametrize("rows", ROWS)
every_budget = pytest.mark.parametrize("budget", BUDGETS)
every_decode = pytest.mark.parametrize("decode", ("evict", "grow"))


def make(policy, rows="kv_head", budget=48, **fields):
    config = UncompConfig(policy=policy, rows=rows, budget=budget, **fields)
    return config, shape_of(config)


def mean(config, n):
    return n if config.keeps_all else mean_tokens(config.budget, n, config.floor)


@every_policy
@every_rows
@every_budget
def test_what_a_prompt_leaves(policy, rows, budget):
    config, shape = make(policy, rows, budget)
    run = Run(config, shape, list(LENGTHS))
    stored = [0] * len(LENGTHS)
    for layer, held in enumerate(run.layers):
        granted = held.limit.tolist()
        for row, kept in enumerate(run.kept(layer)):
            n, limit = LENGTHS[row // shape.rows], granted[row // shape.rows][row % shape.rows]
            assert kept == sorted(set(kept)) and all(0 <= p < n for p in kept)  # (1)
            assert set(range(min(config.sinks, n))) | set(range(max(n - config.window, 0), n)) <= set(kept)  # (2)
            assert len(kept) == min(limit, n) and limit >= min(config.floor, n)
            stored[row // shape.rows] += len(kept)
        assert held.kv_bytes == held.capacity * 2 * 16 * 4  # (8)
        assert held.state_bytes == sum(t.nbytes for t in held.tensors()) - held.kv_bytes
    rows_of_model = shape.rows * shape.num_layers
    assert stored == [rows_of_model * min(mean(config, n), n) for n in LENGTHS]  # (3)


@every_policy
@every_rows
@every_decode
@every_budget
def test_decode_attends_to_what_is_kept(policy, rows, decode, budget):
    config, shape = make(policy, rows, budget, decode=decode, max_new_tokens=6)
    run = Run(config, shape, [150, 40, 5])
    for _ in range(14):
        before, position = [run.kept(layer) for layer in range(shape.num_layers)], list(run.seen)
        out = run.step()
        for layer in range(shape.num_layers):
            want = run.attended(layer, before[layer], position)  # (4) with budget 1.0, else (5)
            torch.testing.assert_close(out[layer].double(), want, rtol=0, atol=2e-5)
            for row, kept in enumerate(run.kept(layer)):  # (7)
                n, was = run.seen[row // shape.rows], before[layer][row]
                limit = int(run.layers[layer].limit.flatten()[row])
                grown = len(was) + 1
                assert len(kept) == (grown if config.grows else min(grown, limit))
                assert set(kept) <= {*was, n - 1} and n - 1 in kept
                assert set(range(max(n - config.vote_window, 0), n)) <= set(kept)
                assert set(range(min(config.sinks, n))) <= set(kept)


@every_policy
@every_rows
@every_decode
@pytest.mark.parametrize("budget", [48, 0.4])
def test_a_padded_batch_equals_its_sequences(policy, rows, decode, budget):
    config, shape = make(policy, rows, budget, decode=decode)
    lengths, turn = [120, 61, 3], [70, 9, 66]
    batch = Run(config, shape, lengths)
    singles = [Run(config, shape, [n], [Story(i, shape)]) for i, n in enumerate(lengths)]

    def same():
        for layer in range(shape.num_layers):
            alone = [sorted(kept) for run in singles for kept in run.kept(layer)]
            assert [sorted(kept) for kept in batch.kept(layer)] == alone

    same()
    for _ in range(5):
        out, alone = batch.step(), [run.step() for run in singles]
        for layer, whole in enumerate(out):
            torch.testing.assert_close(whole, torch.cat([o[layer] for o in alone]), rtol=0, atol=1e-5)
    same()
    batch.turn(turn)
    for run, count in zip(singles, turn, strict=True):
        run.turn([count])
    if decode == "evict":  # with "grow" a short turn is appended, and the longest of a batch says which turn is short
        same()


@every_policy
@every_rows
@every_decode
def test_later_turns_go_back_to_the_plan(policy, rows, decode):
    config, shape = make(policy, rows, 48, decode=decode)
    run = Run(config, shape, [30, 100])
    for count in ([64, 64], [65, 64]):
        run.turn(count)
        for _ in range(2):
            run.step()
        for layer, held in enumerate(run.layers):
            limits = held.limit.flatten().tolist()
            for row, kept in enumerate(run.kept(layer)):
                n = run.seen[row // shape.rows]
                assert len(set(kept)) == len(kept) and max(kept) == n - 1
                assert set(range(n - config.vote_window, n)) <= set(kept)
                assert set(range(config.sinks)) <= set(kept)
                if config.keeps_all:
                    assert sorted(kept) == list(range(n))
                else:
                    assert len(kept) <= limits[row] + (2 if config.grows else 0)
            if not config.keeps_all:
                assert held.limit.sum(1).tolist() == run.compressor.policy.totals(layer, run.seen)
    sums = torch.stack([held.limit.sum(1) for held in run.layers]).sum(0)
    if not config.keeps_all:
        assert sums.tolist() == [shape.rows * shape.num_layers * 48] * 2


@every_policy
def test_one_token_after_another_from_the_first(policy):
    config, shape = make(policy, budget=40)
    run = Run(config, shape, [1])
    for _ in range(60):
        run.step()
    assert all(len(kept) == min(61, int(limit)) if not config.keeps_all else 61
               for layer, held in enumerate(run.layers)
               for kept, limit in zip(run.kept(layer), held.limit.flatten(), strict=True))  # fmt: skip


@every_policy
@every_rows
def test_nan_scores_are_dropped_first(policy, rows):
    config, shape = make(policy, rows, pool_width=1)
    if config.keeps_all:
        pytest.skip("keeps everything without a score")

    def spoil(made):
        score = made.score

        def spoilt(view):
            scores = score(view).clone()
            scores[:, config.sinks : config.sinks + 60] = float("nan")
            return scores

        made.score = spoilt

    run = Run(config, shape, [150], change=spoil)
    lost = range(config.sinks, config.sinks + 60)
    assert not [p for layer in range(shape.num_layers) for kept in run.kept(layer) for p in kept if p in lost]
    assert sum(len(kept) for layer in range(shape.num_layers) for kept in run.kept(layer)) == 48 * 3 * shape.rows

    all_nan = Run(config, shape, [150], change=lambda made: setattr(
        made, "score", lambda view: torch.full((view.num_rows, view.columns), float("nan"))))  # fmt: skip
    for layer, held in enumerate(all_nan.layers):
        for kept, limit in zip(all_nan.kept(layer), held.limit.flatten().tolist(), strict=True):
            low = int(limit) - config.window
            assert kept == [*range(low), *range(150 - config.window, 150)]


@every_policy
def test_the_same_prompt_keeps_the_same_tokens(policy):
    config, shape = make(policy)
    first, second = Run(config, shape, [150, 60]), Run(config, shape, [150, 60])
    assert all(first.kept(layer) == second.kept(layer) for layer in range(shape.num_layers))


@every_policy
def test_an_unknown_option_is_refused(policy):
    config, shape = make(policy, policy_options={"rerotate": True})
    with pytest.raises(ValueError, match=f"policy {policy} has no option rerotate"):
        Run(config, shape, [10])
