# SPDX-License-Identifier: Apache-2.0
"""Takes entropies of a prompt, or counted ranks of a calibration run.

Gives a group id per row, group 0 = lowest entropy.
Formula: rows ordered by (entropy, row index), cut into groups of nearly equal size, leftovers to the outer groups.
docs/method.md "Grouping".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from uncomp import ops

ORDERS = ("ascending", "reverse", "random")


def group_sizes(num_rows: int, num_groups: int) -> list[int]:
    """Rows of every group, lowest entropy first.

    H = aG + e: every group has a rows, the e left over go to the outer groups in turn (last, first, last but one, ...).

    Args:
        num_rows: H, at least 1.
        num_groups: G, 1 to H.
    Returns:
        G sizes that sum to H.
    Raises:
        ValueError: G outside 1 .. H.
    Source: docs/method.md "Grouping".
    """
    if not 1 <= num_groups <= num_rows:
        raise ValueError(f"uncomp.grouping: num_groups must lie in [1, rows = {num_rows}]; got {num_groups}")
    base, left = divmod(num_rows, num_groups)
    front, back = left // 2, (left + 1) // 2
    return [base + (group < front or group >= num_groups - back) for group in range(num_groups)]


def labels(num_rows: int, num_groups: int) -> list[int]:
    """Group of the row that stands at each rank: H group ids, ascending.

    Args, Raises: as group_sizes.
    Source: docs/method.md "Grouping".
    """
    return [group for group, size in enumerate(group_sizes(num_rows, num_groups)) for _ in range(size)]


def label_votes(rank_votes: Sequence[Sequence[int]], num_groups: int) -> list[list[int]]:
    """Votes V[row][label] of one layer from its counted ranks.

    Args:
        rank_votes: [H][H], in how many samples each row had each rank.
        num_groups: G, 1 to H.
    Returns:
        [H][G], in how many samples each row fell into each group.
    Raises:
        ValueError: G outside 1 .. H, or a row of votes that has not H ranks.
    Source: docs/method.md "Calibration and profiles".
    """
    rows = len(rank_votes)
    edges = [0, *accumulate(group_sizes(rows, num_groups))]
    for row, votes in enumerate(rank_votes):
        if len(votes) != rows:
            raise ValueError(f"uncomp.grouping: rank_votes must be [{rows}][{rows}]; row {row} has {len(votes)} ranks")
    return [[sum(votes[a:b]) for a, b in pairwise(edges)] for votes in rank_votes]


def groups_from_labels(votes: Sequence[Sequence[int]], sizes: Sequence[int] | None = None) -> list[list[int]]:
    """Groups of one layer from how often each row carried each label.

    For label 0, 1, ... in turn: of the rows not yet taken, those with the most votes for the label, ties to the lower
    row, as many as the group has rows.

    Args:
        votes: [H][G] votes V[row][label], G at most H.
        sizes: rows of each group; None takes group_sizes(H, G).
    Returns:
        G lists of rows, each ascending; lowest entropy first.
    Raises:
        ValueError: no rows, rows of different widths, G outside 1 .. H, or sizes that do not sum to H.
    Source: docs/method.md "Calibration and profiles".
    """
    widths = {len(row) for row in votes}
    if len(widths) != 1:
        raise ValueError(f"uncomp.grouping: votes must be [H][G] with one G; got rows of {sorted(widths)} labels")
    free, groups = list(range(len(votes))), []
    num_groups = widths.pop()
    if sizes is None:
        sizes = group_sizes(len(votes), num_groups)
    elif len(sizes) != num_groups or sum(sizes) != len(votes) or min(sizes) < 0:
        raise ValueError(
            f"uncomp.grouping: sizes must be {num_groups} numbers that sum to {len(votes)}; got {list(sizes)}"
        )
    for label, size in enumerate(sizes):
        taken = sorted(sorted(free, key=lambda row: (-votes[row][label], row))[:size])
        groups.append(taken)
        free = [row for row in free if row not in taken]
    return groups


def groups_from_votes(rank_votes: Sequence[Sequence[int]], num_groups: int) -> list[list[int]]:
    """Groups of one layer from the counted ranks of a calibration run; any G from the same counts.

    Args, Raises: as label_votes. Returns: as groups_from_labels.
    Source: docs/method.md "Calibration and profiles".
    """
    return groups_from_labels(label_votes(rank_votes, num_groups))


def lowest_rows(rank_votes: Sequence[Sequence[int]], count: int) -> list[int]:
    """The `count` rows of a layer that stood among the lowest `count` ranks most often; ties to the lower row.

    Args:
        rank_votes: [H][H], as label_votes. count: 0 to H.
    Returns:
        Ascending rows.
    Raises:
        ValueError: a count outside 0 .. H.
    Source: docs/method.md "Deleted heads".
    """
    if not 0 <= count <= len(rank_votes):
        raise ValueError(f"uncomp.grouping: count must lie in [0, rows = {len(rank_votes)}]; got {count}")
    votes = [[sum(ranks[:count]), sum(ranks[count:])] for ranks in rank_votes]
    return groups_from_labels(votes, [count, len(votes) - count])[0]


def group_ids(groups: Sequence[Sequence[int]]) -> list[int]:
    """Group id of every row, from the list of rows of every group.

    Args:
        groups: G lists that hold each of the rows 0 .. H - 1 once.
    Returns:
        H group ids.
    Raises:
        ValueError: the lists do not hold each row once.
    """
    group_of = {row: group for group, rows in enumerate(groups) for row in rows}
    count = sum(len(rows) for rows in groups)
    if sorted(group_of) != list(range(count)):
        raise ValueError(
            f"uncomp.grouping: groups must hold each row of 0 .. H - 1 once; got {list(map(list, groups))}"
        )
    return [group_of[row] for row in range(count)]


def check_order(order: str) -> None:
    """Raises ValueError unless order is "ascending", "reverse" or "random"."""
    if order not in ORDERS:
        raise ValueError(f"uncomp.grouping: order must be one of {', '.join(ORDERS)}; got {order!r}")


def random_groups(num_rows: int, num_groups: int, seed: int, layer: int) -> list[int]:
    """Group ids of one random permutation of the rows: the same for all prompts, fixed by (seed, layer).

    Args:
        num_rows, num_groups: H and G, as group_sizes.
        seed, layer: integers; another layer has another permutation.
    Returns:
        H group ids, with the sizes of group_sizes.
    Raises:
        ValueError: G outside 1 .. H.
    Source: docs/method.md "Grouping".
    """
    ids = labels(num_rows, num_groups)
    random.Random(f"uncomp.grouping seed={seed} layer={layer}").shuffle(ids)
    return ids


def ordered(
    ids: Sequence[int], num_groups: int, order: str = "ascending", *, seed: int = 42, layer: int = 0
) -> list[int]:
    """Group ids of a profile under the ablations of the order; the sizes of the budgets stay.

    Args:
        ids: H group ids, 0 = lowest entropy.
        num_groups: G.
        order: "ascending" leaves them, "reverse" turns them round, "random" ignores them for random_groups.
        seed, layer: of the random order.
    Returns:
        H group ids.
    Raises:
        ValueError: an unknown order, G outside 1 .. H.
    Source: docs/method.md "Grouping".
    """
    check_order(order)
    if order == "random":
        return random_groups(len(ids), num_groups, seed, layer)
    return [num_groups - 1 - group for group in ids] if order == "reverse" else list(ids)


@lru_cache(maxsize=4096)
def int32_on(device: torch.device, values: tuple[int, ...]) -> Tensor:
    """Host integers as an int32 tensor on a device, copied there once; shared, so never written to."""
    return torch.tensor(values, dtype=torch.int32, device=device)


@lru_cache(maxsize=4096)
def _random_ids(num_rows: int, num_groups: int, seed: int, layer: int) -> tuple[int, ...]:
    return tuple(random_groups(num_rows, num_groups, seed, layer))


def groups_online(entropy: Tensor, num_groups: int, order: str = "ascending", seed: int = 42, layer: int = 0) -> Tensor:
    """Group ids from the entropies of the running prompt; NaN ranks highest. No host sync.

    Args:
        entropy: [B, H] float32 entropies of the rows, one order per sequence.
        num_groups: G, 1 to H.
        order: "ascending", "reverse" (group ids turned round) or "random" (one permutation of (seed, layer) for all
            sequences and prompts; made on the host and copied to a device once).
        seed, layer: of the random order.
    Returns:
        [B, H] int32 on the device of the entropies.
    Raises:
        TypeError: entropy not float32.
        ValueError: a wrong shape, G outside 1 .. H, an unknown order.
    Source: docs/method.md "Grouping".
    """
    check_order(order)
    if order == "random":
        if entropy.dim() != 2:
            raise ValueError(f"uncomp.grouping: entropy must have shape [B, H]; got {list(entropy.shape)}")
        ids = int32_on(entropy.device, _random_ids(entropy.shape[1], num_groups, seed, layer))
        return ids.repeat(entropy.shape[0], 1)
    return ops.group_heads(entropy, num_groups, order=order)[0]
