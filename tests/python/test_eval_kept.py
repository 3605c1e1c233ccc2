# SPDX-License-Identifier: Apache-2.0
"""What rows hold is counted from stored positions; dead slots, which hold anything, do not count."""

from __future__ import annotations

import pytest
import torch

from uncomp.cache import RaggedLayer
from uncomp.eval.kept import kept_shares
from uncomp.types import DecodeRule


def layer(*rows, batch=1, room=6):
    """A layer whose rows hold these positions; dead slots hold position 0."""
    count, capacity = len(rows), len(rows) * room
    position = torch.zeros(capacity, dtype=torch.int32)
    for i, held in enumerate(rows):
        position[i * room : i * room + len(held)] = torch.tensor(held, dtype=torch.int32)
    start = torch.arange(count + 1, dtype=torch.int32) * room
    length = torch.tensor([len(held) for held in rows], dtype=torch.int32)
    keys = torch.zeros(capacity, 8)
    per = count // batch
    limit = length.view(batch, per)
    return RaggedLayer(keys, keys, position, start, length, limit, batch, per, [per * room] * batch, DecodeRule("vote"))


def test_consensus_is_the_mean_over_pairs_and_layers():
    """Rows {1,2,3}, {2,3,4} have half of their tokens in common; equal rows all; {5}, {6} none."""
    (found,) = kept_shares([layer([1, 2, 3], [2, 3, 4])], [[]], 8)
    assert found.consensus == pytest.approx(0.5) and found.evicted is None
    (found,) = kept_shares([layer([1, 2, 3], [2, 3, 4]), layer([7], [7])], [[]], 8)
    assert found.consensus == pytest.approx(0.75)
    (found,) = kept_shares([layer([5], [6], [5])], [[]], 8)
    assert found.consensus == pytest.approx(1 / 3)


def test_evicted_means_that_no_row_of_any_layer_holds_it():
    layers = [layer([1, 2], [2, 3]), layer([5], [1])]
    assert kept_shares(layers, [[1, 2, 3, 5]], 8)[0].evicted == 0.0
    assert kept_shares(layers, [[0, 1, 4, 5]], 8)[0].evicted == 0.5  # position 0 stands in dead slots only
    assert kept_shares(layers, [[6, 7]], 8)[0].evicted == 1.0


def test_sequences_of_a_batch_are_apart():
    found = kept_shares([layer([1], [1], [2], [3], batch=2)], [[2], [2]], 8)
    assert [f.evicted for f in found] == [1.0, 0.0]
    assert [f.consensus for f in found] == [1.0, 0.0]


def test_one_row_has_nobody_to_agree_with():
    assert kept_shares([layer([1, 2])], [[1]], 8)[0].consensus is None


def test_tokens_behind_the_prompt_are_not_looked_at():
    assert kept_shares([layer([1, 9], [1, 8])], [[1]], 4)[0].consensus == 1.0
