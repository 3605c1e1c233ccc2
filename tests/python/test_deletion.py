# SPDX-License-Identifier: Apache-2.0
"""deletion: rows that stay, partners by cosine with their ties, and the way of tensors to those rows and back."""

import math

import pytest
import torch

from uncomp import deletion


def mask(*rows: str) -> torch.Tensor:
    """Deleted rows are crosses."""
    return torch.tensor([[c == "x" for c in row] for row in rows])


def keys(*heads: list[float], tokens: int = 8) -> torch.Tensor:
    """[1, H, tokens, 2]: each head repeats one vector."""
    return torch.tensor(heads).view(1, len(heads), 1, 2).repeat(1, 1, tokens, 1)


# ---- values
def test_the_partner_has_the_largest_cosine(device):
    key = keys([1, 0], [0, 5], [1, 0.9], [0.1, 3], tokens=20).to(device)
    kept = deletion.choose(mask("x..x").to(device), key, None, 2)
    assert kept.row.tolist() == [[1, 2]] and kept.source.tolist() == [[1, 0, 1, 0]]
    assert kept.row.device.type == kept.source.device.type == device


def test_only_the_last_eight_keys_count():
    key = keys([1, 0], [1, 0], [0, 1], tokens=20)
    key[0, 1, :12] = 100.0
    assert deletion.choose(mask("x.."), key, None, 1).source.tolist() == [[0, 0, 1]]
    key[0, 1, 12:], key[0, 2, 12:] = key[0, 2, 12:].clone(), key[0, 1, 12:].clone()
    assert deletion.choose(mask("x.."), key, None, 1).source.tolist() == [[1, 0, 1]]


def test_ties_go_to_the_lower_row_and_zero_vectors_have_cosine_zero():
    assert deletion.choose(mask("..x"), keys([2, 0], [1, 0], [3, 0]), None, 1).source.tolist() == [[0, 1, 0]]
    assert deletion.choose(mask("..x"), keys([-1, 0], [0, 0], [1, 0]), None, 1).source.tolist() == [[0, 1, 1]]
    assert deletion.choose(mask("x.."), keys([0, 0], [-1, 0], [1, 0]), None, 1).source.tolist() == [[0, 0, 1]]
    nan = keys([1, 0], [math.nan, 0], [-1, 0])
    assert deletion.choose(mask("x.."), nan, None, 1).source.tolist() == [[1, 0, 1]]


def test_rows_of_query_heads_share_the_keys_of_their_kv_head():
    key = keys([1, 0], [0, 1])
    # Row 1 finds row 0 of its own KV head; rows 2 and 3 lost theirs altogether.
    kept = deletion.choose(mask(".xxx"), key, None, 3)
    assert kept.row.tolist() == [[0]] and kept.source.tolist() == [[0, 0, 0, 0]]
    assert deletion.choose(mask(".x.."), key, None, 1).source.tolist() == [[0, 0, 1, 2]]


def test_padding_does_not_count():
    short, long = keys([1, 0], [0, 1], [1, 0.1], tokens=3), keys([1, 0], [1, 0.1], [0, 1], tokens=12)
    key = torch.full((2, 3, 12, 2), math.nan)
    key[0, :, 9:], key[1] = short[0], long[0]
    kept = deletion.choose(mask("x..", "x.."), key, torch.tensor([9, 0], dtype=torch.int32), 1)
    assert kept.source.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert deletion.choose(mask("x.."), short, None, 1).source.tolist() == [[1, 0, 1]]
    empty = deletion.choose(mask("x.."), key[:1], torch.tensor([12], dtype=torch.int32), 1)
    assert empty.source.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("group", [1, 3])
def test_there_and_back(device, group):
    states = torch.randn(2, 4 * group, 5, 8, device=device).transpose(2, 3).contiguous().transpose(2, 3)
    kept = deletion.KeptRows(
        torch.tensor([[0, 2], [1, 3]], device=device), torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]], device=device)
    )
    heads = states.view(2, 4, group, 5, 8)
    small = deletion.narrow(states, kept.row, 4)
    assert small.is_contiguous()
    assert torch.equal(small, torch.stack([heads[0, [0, 2]], heads[1, [1, 3]]]).flatten(1, 2))
    back = deletion.widen(small, kept).view(2, 4, group, 5, 8)
    assert torch.equal(back, torch.stack([heads[0, [0, 2, 2, 0]], heads[1, [3, 1, 1, 3]]]))


def test_keys_of_query_head_rows_are_repeated():
    key = torch.randn(1, 2, 5, 8)
    assert torch.equal(deletion.narrow(key, torch.tensor([[1, 2, 3]]), 4), key[:, [0, 1, 1]])
