# SPDX-License-Identifier: Apache-2.0
"""An arena of latents as attention needs it, made by torch: keys of every slot, and a row for every KV head.

The reference body of what kernels do tile by tile, and the road of what no kernel does.
Source: docs/policies.md "LoRC".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uncomp.latent import KeyCodec, wide


@dataclass
class Slots:
    """Slots of an arena, as rows of equal width: all that torch needs to work on rows at once.

    An arena may have more slots than its rows: of repacked rows that were not full the host knows no better bound.
    """

    row_start: Tensor  # [R + 1] int32, at most C
    widest: int  # room of the longest row, or more
    rows_of_one: int  # cache rows of one sequence
    capacity: int  # C

    @property
    def num_rows(self) -> int:
        """R."""
        return self.row_start.numel() - 1

    def place(self) -> Tensor:
        """[R, widest] int64, slot of every column; clamped behind the end."""
        column = torch.arange(self.widest, device=self.row_start.device)
        return (self.row_start[:-1].long().unsqueeze(1) + column).clamp(max=max(self.capacity - 1, 0))

    def row(self) -> Tensor:
        """[C] int64, the row of every slot; behind all rows, the last."""
        slot = torch.arange(self.capacity, dtype=torch.int32, device=self.row_start.device)
        return torch.searchsorted(self.row_start[1:], slot, right=True).clamp(max=max(self.num_rows - 1, 0))

    def head(self, heads: int) -> Tensor:
        """[R] int64, which of `heads` a row belongs to."""
        return (
            (torch.arange(self.num_rows, device=self.row_start.device) % self.rows_of_one) * heads // self.rows_of_one
        )

    def flat(self, padded: Tensor) -> Tensor:
        """[C, ...] of [R, widest, ...]."""
        slot, row = torch.arange(self.capacity, device=padded.device), self.row()
        column = (slot - self.row_start[row]).clamp(max=max(self.widest - 1, 0))  # of slots behind all rows any
        return padded.flatten(0, 1)[row * self.widest + column]


def arena_keys(codec: KeyCodec, rows: Tensor, slot_position: Tensor, slots: Slots, offset: Tensor | None) -> Tensor:
    """Keys of a whole arena.

    Costs 2 C rank D flops and several times C D numbers of memory a call, where C counts rows as if all were as long as
    the longest.

    Args:
        rows: [C, rank]. slot_position: [C] int32. offset: see Latents.
    Returns:
        [C, shared * D]; arbitrary in dead slots.
    """
    place = slots.place()
    position = slot_position[place]
    if offset is not None:
        position = position + offset.repeat_interleave(slots.rows_of_one).unsqueeze(1)
    return slots.flat(codec.keys(rows[place], position, slots.head(codec.heads)))


def arena_values(codec: KeyCodec, rows: Tensor, slots: Slots) -> Tensor:
    """[C, shared * D], values of a whole arena whose rows [C, rank of values] several heads share."""
    return slots.flat(wide(codec.values, rows[slots.place()], slots.head(codec.heads)))


def unfolded(states: Tensor, slots: Slots, shared: int) -> Tensor:
    """A row for every head: [C * shared, D] of [C, shared * D]; the rows of a group follow each other."""
    start, slot = slots.row_start.long(), torch.arange(slots.capacity, device=states.device)
    row, room = slots.row(), start[1:] - start[:-1]
    behind = slot >= start[-1]  # all rows: such a slot stays behind them, apart from every other
    first = torch.where(behind, shared * slot, (shared - 1) * start[row] + slot).unsqueeze(1)
    step = room[row].masked_fill(behind, 1).unsqueeze(1)
    target = first + torch.arange(shared, device=states.device) * step
    flat = states.unflatten(1, (shared, -1)).flatten(0, 1)
    return torch.empty_like(flat).index_copy_(0, target.flatten(), flat)


def unfolded_layout(row_start: Tensor, row_len: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """row_start [R * shared + 1] and row_len [R * shared] int32 of unfolded rows."""
    room = (row_start[1:] - row_start[:-1]).repeat_interleave(shared)
    return torch.cat([room.new_zeros(1), room.cumsum(0, dtype=torch.int32)]), row_len.repeat_interleave(shared)
