# SPDX-License-Identifier: Apache-2.0
"""seed_votes_, one slot at a time in float64: the weights that the votes stand for, before they become integers."""

import math

import torch


def vote_bits(vote_window):
    """Fraction bits of a vote."""
    return 31 - math.ceil(math.log2(vote_window)) - 1


def vote_weights(query, lse, query_position, arena, vote_window, scale, reduce_group):
    """Weights [Wd, C] float64 of the newest Wd queries on every live slot; 0 on dead slots and behind the query."""
    query, lse, query_position = query.cpu().double(), lse.cpu().double(), query_position.tolist()
    keys, positions = arena.key_rows.cpu().double(), arena.slot_position.tolist()
    batch, heads, window, _ = query.shape
    rows = len(arena.row_len)
    per_sequence = rows // max(batch, 1)
    group = heads // max(per_sequence, 1)
    weights = torch.zeros(vote_window, len(positions), dtype=torch.float64)
    for row in range(rows):
        b, h = divmod(row, per_sequence)
        start, length = int(arena.row_start[row]), int(arena.row_len[row])
        for vote in range(vote_window):
            i = window - vote_window + vote
            at = query_position[b][i]
            for slot in range(start, start + length):
                if at < 0 or positions[slot] > at:
                    continue
                mine = slice(h * group, (h + 1) * group)
                logits = scale * (query[b, mine, i] * keys[slot]).sum(1)
                of_heads = torch.exp(logits - lse[b, mine, i])
                weights[vote, slot] = of_heads.max() if reduce_group == "max" else of_heads.mean()
    return weights
