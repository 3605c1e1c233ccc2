# SPDX-License-Identifier: Apache-2.0
"""How far a cache has come: columns and real tokens that its sequences have seen, kept by the host.

The model's logical length is columns seen, padding included; what the rows store is another number and never leaves
this package. A forward begins, its layers store, and it is committed; if one fails in between, some layers hold tokens
that others do not, so the cache is refused from then on.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from uncomp.hf import compat
from uncomp.types import Lengths


def _hint(past: int) -> str:
    """What may be behind a forward that does not continue the past."""
    if not past:
        return ""
    if not compat.has_chunked_turns():
        return " (chunked prefill of a later turn needs transformers 5.21 or newer)"
    return " (pass the whole conversation to generate, or start with a new cache)"


@dataclass
class Chunk:
    """The new columns of one forward."""

    tokens: int  # columns T
    lengths: Lengths | None  # real tokens among them, as a suffix; None for a decode step, where all are real
    prior: list[int] | None  # [B] real tokens before them; None for a decode step
    pack: Tensor | None = None  # [B, T] int64: column that moves to each place, so that the real ones are a suffix
    voided: bool = False  # a later mask took tokens back that the rows hold


class Clock:
    """Logical time of one cache."""

    def __init__(self) -> None:
        self.columns = 0
        self.seen: list[int] | None = None  # [B] real tokens at the last chunk
        self.steps = 0  # decode steps since then
        self.displaced = 0  # tokens that a later mask took back
        self.broken = False
        self.chunk: Chunk | None = None
        self.offset: list[int] | None = None  # [B] model position of the first real token
        self._mask: Tensor | None = None  # [B, columns at the last chunk] bool, on the host
        self._single = True  # every forward so far had one column
        self._position: dict[torch.device, Tensor] = {}
        self._stale: set[torch.device] = set()  # where the tensor above must be written again

    def __deepcopy__(self, memo) -> Clock:
        twin = copy.copy(self)
        twin.seen = list(self.seen) if self.seen is not None else None
        twin._position = {device: t.clone() for device, t in self._position.items()}
        twin._stale = set(self._stale)
        return twin

    @property
    def batch(self) -> int:
        """Sequences, or -1 before the first forward."""
        return -1 if self.seen is None else len(self.seen)

    def real(self) -> list[int]:
        """[B] real tokens seen so far."""
        return [n + self.steps for n in self.seen or []]

    def begin(self, batch: int, tokens: int, mask: Tensor | None, positions: Tensor | None) -> Chunk:
        """Reads the mask of a forward, unless it is a decode step.

        Args:
            mask: [B, columns + T], True at real tokens; None if all are real.
            positions: [B or 1, T] model positions, or None if unknown.
        Raises:
            ValueError: a mask or positions that do not continue what the cache has seen.
            RuntimeError: an earlier forward failed half-way.
        """
        if self.broken or self.chunk is not None:
            self.broken = True
            raise RuntimeError("uncomp: an earlier forward on this cache failed half-way; start with a new cache")
        if self.seen is not None and batch != self.batch:
            raise ValueError(f"uncomp: the cache holds {self.batch} sequences; got a batch of {batch}")
        if tokens == 1 and self.columns > 0 and self._is_step(mask):
            self.chunk = Chunk(1, None, None)
        else:
            self.chunk = self._read(batch, tokens, mask, positions)
        return self.chunk

    def check_step(self, tokens: int) -> None:
        """Refuses one new column at the position that a model makes up, its column, where the past has others.

        Raises:
            ValueError: position_ids are needed.
        """
        if tokens != 1 or not self.columns:
            return
        for b, (n, offset) in enumerate(zip(self.real(), self.offset, strict=True)):
            if n + (offset or 0) != self.columns:
                raise ValueError(
                    f"uncomp: position_ids must be given, as they were before: sequence {b} continues at "
                    f"{n + (offset or 0)}, without them at {self.columns}"
                )

    def _is_step(self, mask: Tensor | None) -> bool:
        """Whether one new column is a decode step: a real token in every sequence, behind an unchanged past.

        On a GPU a mask is read only while all forwards so far had one column (a prompt in chunks of one), because
        reading it waits for the device; otherwise a new token counts as real.
        """
        if mask is None or (mask.device.type != "cpu" and not self._single):
            return True
        width = self.columns + 1
        if mask.dim() != 2 or mask.shape[1] < width:
            return False  # _read says what is wrong
        known = torch.ones(self.batch, width, dtype=torch.bool, device="cpu")
        known[:, : self._mask.shape[1]] = self._mask
        return torch.equal(mask[:, :width].to("cpu", torch.bool), known)

    def commit(self) -> None:
        """The forward succeeded: its columns are part of the past."""
        chunk, self.chunk = self.chunk, None
        if chunk is None:
            return
        self.columns += chunk.tokens
        self._single = self._single and chunk.tokens == 1
        if chunk.lengths is None:
            self.steps += 1
            for position in self._position.values():
                position.add_(1)
            return
        self.seen = [a + b for a, b in zip(chunk.prior, chunk.lengths.length, strict=True)]
        self.steps = 0
        self._mask = self._next_mask
        self._stale.update(self._position)

    def abandon(self) -> None:
        """Tokens went past the cache: what it holds is no longer the past."""
        self.broken, self.chunk = True, None

    def fail(self) -> None:
        """The forward raised."""
        self.broken, self.chunk = self.chunk is not None or self.broken, None

    def position(self, device: torch.device) -> Tensor:
        """[B] int32, real tokens before the current column; advanced in place by `commit`."""
        if device in self._stale:
            self._stale.remove(device)
            real, known = torch.tensor(self.real(), dtype=torch.int32, device="cpu"), self._position[device]
            if known.shape == real.shape:
                known.copy_(real)
            else:
                del self._position[device]
        if device not in self._position:
            with torch.inference_mode(False):  # a step in another mode must be able to advance it
                self._position[device] = torch.tensor(self.real(), dtype=torch.int32, device=device)
        return self._position[device]

    def keep_position_in(self, tensor: Tensor) -> None:
        """From now on `position` of the tensor's device is this one, [B] int32."""
        tensor.copy_(self.position(tensor.device))
        self._position[tensor.device] = tensor

    def advance(self, steps: int) -> None:
        """Counts decode steps that advanced `position` themselves; the forward that was begun is over."""
        self.chunk = None
        self.columns += steps
        self.steps += steps

    def select(self, index: list[int]) -> None:
        """Sequence i continues as sequence index[i]."""
        if self.seen is None:
            return
        self.seen = [self.seen[i] for i in index]
        self.offset = [self.offset[i] for i in index]
        self._mask = self._mask[index]
        self._stale.update(self._position)

    def newest(self, columns: int) -> list[int]:
        """[B] real tokens among the newest columns."""
        back = min(self.steps, columns)
        rest = columns - back
        counts = self._mask[:, self._mask.shape[1] - rest :].sum(1).tolist() if rest else [0] * self.batch
        return [back + n for n in counts]

    def rewind(self, columns: int) -> None:
        """Forgets the newest columns."""
        counts = self.newest(columns)
        self.columns -= columns
        back = min(self.steps, columns)
        self.steps -= back
        if columns > back:
            self.seen = [n - (gone - back) for n, gone in zip(self.seen, counts, strict=True)]
            self._mask = self._mask[:, : self._mask.shape[1] - (columns - back)]
        self._stale.update(self._position)

    def _read(self, batch: int, tokens: int, mask: Tensor | None, positions: Tensor | None) -> Chunk:
        past = self.columns
        if mask is None:
            mask = torch.ones(batch, past + tokens, dtype=torch.bool, device="cpu")
            if self._mask is not None:
                mask[:, : self._mask.shape[1]] = self._mask
        else:
            if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < past + tokens:
                wanted = f"[{batch}, {past + tokens}] (columns seen and new)"
                raise ValueError(f"uncomp: attention_mask must be {wanted}; got {list(mask.shape)}{_hint(past)}")
            mask = mask[:, : past + tokens].to("cpu", torch.bool)
        new = mask[:, past:]
        prior = mask[:, :past].sum(1).tolist()
        self._check_past(mask[:, :past], prior)
        lengths = Lengths(new.sum(1).tolist(), tokens)
        suffix = torch.arange(tokens, device="cpu") >= torch.tensor(lengths.first, device="cpu").unsqueeze(1)
        pack = None if torch.equal(suffix, new) else torch.argsort(new.to(torch.int8), dim=1, stable=True)
        if past == 0 and pack is not None and not new[:, -1].all():
            empty = [n == 0 for n in lengths.length]
            if any(not new[b, -1] and not empty[b] for b in range(batch)):
                raise ValueError(
                    "uncomp: attention_mask pads on the right; pad prompts on the left (padding_side='left')"
                )
        self._check_positions(new, prior, positions)
        voided = any(p < n for p, n in zip(prior, self.real(), strict=True)) if self.seen is not None else False
        if voided:
            self.displaced += sum(n - p for p, n in zip(prior, self.real(), strict=True))
        self._next_mask = mask
        return Chunk(tokens, lengths, prior, pack, voided)

    def _check_past(self, past: Tensor, prior: list[int]) -> None:
        if self._mask is None:
            return
        known = torch.ones_like(past)
        known[:, : self._mask.shape[1]] = self._mask
        if (past & ~known).any():
            raise ValueError("uncomp: attention_mask makes columns real that were padding when the cache stored them")
        last = (
            torch.where(past, torch.arange(past.shape[1], device="cpu"), -1).amax(1)
            if past.shape[1]
            else past.new_zeros(0)
        )
        lost = known & ~past
        if past.shape[1] and (lost & (torch.arange(past.shape[1], device="cpu") < last.unsqueeze(1))).any():
            raise ValueError(
                "uncomp: attention_mask takes back a stored token in front of others; only the newest can go"
            )

    def _check_positions(self, new: Tensor, prior: list[int], positions: Tensor | None) -> None:
        if positions is None:
            self.offset = self.offset or [0] * len(prior)
            return
        if positions.dim() != 2:
            raise ValueError(f"uncomp: position_ids must be [batch, tokens]; got {list(positions.shape)}")
        positions = positions.to("cpu").expand(new.shape[0], -1)
        start = new.to(torch.int8).argmax(1)
        offset = [int(positions[b, start[b]]) - p if new[b].any() else None for b, p in enumerate(prior)]
        if self.offset is None:
            self.offset = [None] * len(prior)
        for b, (now, before) in enumerate(zip(offset, self.offset, strict=True)):
            if now is None:
                continue
            if before is not None and now != before:
                raise ValueError(
                    f"uncomp: position_ids of sequence {b} must continue at {prior[b] + before} after the {prior[b]} "
                    f"real tokens that the cache has seen; got {now + prior[b]}{_hint(prior[b])}"
                )
            self.offset[b] = now
