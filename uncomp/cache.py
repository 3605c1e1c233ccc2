# SPDX-License-Identifier: Apache-2.0
"""The compressed layer: an arena of ragged rows, and what moves inside it. Knows no model and no policy.

A row belongs to one sequence and one KV head (or query head); its slots lie one behind the other, its live tokens
first. Slots are never shifted to make room: evicting overwrites, appending fills free slots.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from uncomp.deletion import KeptRows
from uncomp.latent import KeyCodec, Latents
from uncomp.types import DecodeRule


@dataclass
class VoteState:
    """What a constant-length row remembers of the last queries (docs/method.md "Decode")."""

    votes: Tensor  # [Wd, C] int32, ring of fixed-point weights
    vote_sum: Tensor  # [C] int32
    vote_step: Tensor  # [R] int32
    order: Tensor  # [C] int32, slots by position

    @classmethod
    def empty(cls, vote_window: int, capacity: int, num_rows: int, device: torch.device) -> VoteState:
        """All zero."""
        return cls(
            torch.zeros(vote_window, capacity, dtype=torch.int32, device=device),
            torch.zeros(capacity, dtype=torch.int32, device=device),
            torch.zeros(num_rows, dtype=torch.int32, device=device),
            torch.zeros(capacity, dtype=torch.int32, device=device),
        )


@dataclass
class RaggedLayer:
    """One layer of a compressed cache."""

    key_rows: Tensor  # [C, Dk]; with a codec what keys are made of
    value_rows: Tensor  # [C, Dv]
    slot_position: Tensor  # [C] int32, real tokens counted from 0
    row_start: Tensor  # [R + 1] int32, slots
    row_len: Tensor  # [R] int32, tokens
    limit: Tensor  # [B, rows] int32, tokens that the plan grants a row
    batch: int
    rows: int  # of one sequence
    slots: list[int]  # [B] slots of each sequence; their sum is C
    rule: DecodeRule
    statistic: Tensor | None = None  # [B, rows] float32, what the order of heads was made from
    state: VoteState | None = None  # rule.kind "vote"
    mass: Tensor | None = None  # [R, widest room] float32, the other kinds but "position"
    free: int | None = None  # decode="grow": free slots of every row, known to the host
    kept: Tensor | None = None  # [B, rows] int64, where rows of the model are deleted: those that these are
    source: Tensor | None = None  # [B, all rows] int64, place among the rows whose output each row of the model has
    recent: int = 0  # newest tokens that are known to be contiguous: the window, and all that came after it
    codec: KeyCodec | None = None  # turns key_rows into keys; None: they are keys
    offset: Tensor | None = (
        None  # [B] int32, model position minus slot_position, where a codec needs it and they differ
    )
    widest: int | None = None  # room of the longest row, slots; read back when a codec needs it

    def __deepcopy__(self, memo: dict) -> RaggedLayer:
        """A copy that shares no memory of tokens; a codec belongs to the model."""
        if self.codec is not None:
            memo[id(self.codec)] = self.codec
        twin = memo[id(self)] = copy.copy(self)
        for f in fields(self):
            setattr(twin, f.name, copy.deepcopy(getattr(self, f.name), memo))
        return twin

    # ---- what codecs need
    def measure(self) -> None:
        """Reads back the room of the longest row, unless it is known: keys.all_keys must know it, recorded or not."""
        if self.widest is None:
            self.widest = int((self.row_start[1:] - self.row_start[:-1]).max()) if self.num_rows else 0

    def shift(self, offset: Tensor | None) -> bool:
        """Sets what model positions are ahead of stored ones; True if recorded steps cannot know of it.

        Args:
            offset: [B] int32, or None for zeros.
        """
        if offset is not None and self.offset is not None:
            self.offset.copy_(offset)
            return False
        moved, self.offset = (offset is None) != (self.offset is None), offset
        return moved

    def put(self, latent: Latents, position: Tensor) -> None:
        """Writes a new token's latents into the slots that were given to it.

        Args:
            position: [B] int32, the stored position of the token; no other live slot of its sequence has it.
        """
        slot = torch.arange(self.capacity, dtype=torch.int32, device=self.row_start.device)
        row = self.slot_rows()
        live = slot - self.row_start[row] < self.row_len[row]
        taken = live & (self.slot_position == position[row // self.rows])
        stored = latent.rows.repeat_interleave(self.rows // latent.rows.shape[1], 1).flatten(0, 2)  # [R, rank]
        self.key_rows.copy_(torch.where(taken.unsqueeze(1), stored[row], self.key_rows))

    # ---- sizes
    @property
    def capacity(self) -> int:
        """Slots C."""
        return self.key_rows.shape[0]

    @property
    def num_rows(self) -> int:
        """R."""
        return self.batch * self.rows

    @property
    def kept_rows(self) -> KeptRows | None:
        """Which rows of the model these are; None where they are all."""
        return None if self.kept is None else KeptRows(self.kept, self.source)

    def stored(self) -> Tensor:
        """[B, all rows] int32, tokens of every row of the model; 0 for a deleted one."""
        held = self.row_len.view(self.batch, self.rows)
        return held if self.kept is None else held.new_zeros(self.source.shape).scatter_(1, self.kept, held)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, free slots included."""
        return sum(t.numel() * t.element_size() for t in (self.key_rows, self.value_rows))

    @property
    def state_bytes(self) -> int:
        """Bytes of everything else: positions, layout, votes."""
        return sum(t.numel() * t.element_size() for t in self.tensors()) - self.kv_bytes

    def tensors(self) -> list[Tensor]:
        """Every tensor that the layer holds."""
        found = []
        for holder in (self, self.state):
            if holder is not None:
                found += [value for value in vars(holder).values() if isinstance(value, Tensor)]
        return found

    def slot_rows(self) -> Tensor:
        """[C] int64, the row of every slot."""
        slot = torch.arange(self.capacity, dtype=torch.int32, device=self.row_start.device)
        row = torch.searchsorted(self.row_start[1:], slot, right=True)
        return row.clamp(max=max(self.num_rows - 1, 0))

    # ---- the memory of another layer
    def fits(self, other: RaggedLayer) -> bool:
        """True if `copy_` can take the other layer in: equal shapes, dtypes and devices, equal rules."""
        mine, theirs = self.tensors(), other.tensors()
        return (
            (self.batch, self.rows, self.rule, len(mine)) == (other.batch, other.rows, other.rule, len(theirs))
            and (self.free is None) == (other.free is None)
            and (self.widest is None or other.widest is None or other.widest <= self.widest)
            and self.codec is other.codec
            and all(
                (a.shape, a.dtype, a.device, a.is_inference()) == (b.shape, b.dtype, b.device, b.is_inference())
                for a, b in zip(mine, theirs, strict=True)
            )
        )

    def copy_(self, other: RaggedLayer) -> None:
        """Becomes a copy of a layer that `fits`, in this layer's memory."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)
        self.slots, self.free, self.recent = list(other.slots), other.free, other.recent
        if self.widest is None or other.widest is None:  # else steps may be recorded that look at so many slots
            self.widest = other.widest

    # ---- copies and choices of sequences
    def fork(self) -> RaggedLayer:
        """A copy that shares no memory with this layer."""
        return copy.deepcopy(self)

    def select(self, index: Tensor) -> None:
        """Makes sequence i a copy of sequence index[i]; in place where the batch stays as large.

        Args:
            index: [B'] int64, sequences.
        Raises:
            ValueError: the sequences differ in their slots, so that one does not fit where another was.
        """
        index = index.to(self.key_rows.device)
        picked = index.tolist() if len(set(self.slots)) > 1 else [0] * index.numel()
        slots = [self.slots[i] for i in picked]
        same_batch = index.numel() == self.batch
        if same_batch and slots != self.slots:
            raise ValueError("uncomp: sequences whose caches differ in size cannot change places")
        bases, base = [], 0
        for size in self.slots:
            bases.append(base)
            base += size
        if len(set(self.slots)) <= 1:
            size = self.slots[0] if self.slots else 0
            source = (index.view(-1, 1) * size + torch.arange(size, device=index.device)).flatten()
        else:
            spans = [torch.arange(bases[i], bases[i] + self.slots[i], device=index.device) for i in picked]
            source = torch.cat(spans) if spans else index
        per_row = (index.view(-1, 1) * self.rows + torch.arange(self.rows, device=index.device)).flatten()
        room = (self.row_start[1:] - self.row_start[:-1])[per_row]
        new_start = torch.cat([room.new_zeros(1), room.cumsum(0, dtype=torch.int32)])
        self._assign("row_start", new_start, same_batch)
        for name in ("key_rows", "value_rows", "slot_position"):
            self._assign(name, getattr(self, name).index_select(0, source), same_batch)
        for name in ("row_len", "mass"):
            if getattr(self, name) is not None:
                self._assign(name, getattr(self, name).index_select(0, per_row), same_batch)
        for name in ("limit", "statistic", "kept", "source", "offset"):
            if getattr(self, name) is not None:
                self._assign(name, getattr(self, name).index_select(0, index), same_batch)
        if self.state is not None:
            moved = VoteState(
                self.state.votes.index_select(1, source),
                self.state.vote_sum.index_select(0, source),
                self.state.vote_step.index_select(0, per_row),
                self.state.order.index_select(0, source),
            )
            for f in fields(VoteState):
                if same_batch:
                    getattr(self.state, f.name).copy_(getattr(moved, f.name))
                else:
                    setattr(self.state, f.name, getattr(moved, f.name))
        self.batch, self.slots = index.numel(), slots if len(set(self.slots)) > 1 else self.slots[:1] * index.numel()

    def _assign(self, name: str, value: Tensor, in_place: bool) -> None:
        if in_place:
            getattr(self, name).copy_(value)
        else:
            setattr(self, name, value)

    # ---- room at the end of rows (decode="grow")
    def ensure_free(self, tokens: int) -> None:
        """Makes room for `tokens` more in every row; an arena that is too small grows by at least a half."""
        if self.free is None or tokens <= self.free:
            return
        widest = max(self.slots) // max(self.rows, 1)
        self._enlarge(max(tokens - self.free, widest // 2, 16))

    def count(self, tokens: int) -> None:
        """Notes that every row has appended `tokens`."""
        if self.free is not None:
            self.free -= tokens
            self.recent += tokens

    def _enlarge(self, extra: int) -> None:
        shift = torch.arange(self.num_rows, device=self.row_start.device) * extra
        target = torch.arange(self.capacity, device=shift.device) + shift[self.slot_rows()]
        capacity = self.capacity + self.num_rows * extra
        for name in ("key_rows", "value_rows", "slot_position"):
            old = getattr(self, name)
            setattr(self, name, old.new_zeros(capacity, *old.shape[1:]).index_copy_(0, target, old))
        total = torch.arange(self.num_rows + 1, dtype=torch.int32, device=shift.device) * extra
        self.row_start = self.row_start + total
        self.slots = [s + self.rows * extra for s in self.slots]
        self.widest = None if self.widest is None else self.widest + extra
        self.free += extra

    def drop_newest(self, tokens: list[int]) -> None:
        """Cuts the newest tokens off the end of every row (decode="grow").

        Args:
            tokens: [B], how many of each sequence.
        Raises:
            ValueError: a row might have lost one of them already.
        """
        most = max(tokens, default=0)
        if most == 0:
            return
        if self.free is None:
            raise ValueError(
                'uncomp: a cache with decode="evict" cannot be cropped: evicted tokens are gone; use decode="grow"'
            )
        if most > self.recent:
            raise ValueError(
                f"uncomp: at most {self.recent} tokens can be cropped, because older ones were compressed; got {most}"
            )
        count = torch.tensor(tokens, dtype=torch.int32, device=self.row_len.device).repeat_interleave(self.rows)
        self.row_len.sub_(count).clamp_(min=0)
        self.free += min(tokens)
        self.recent -= most
