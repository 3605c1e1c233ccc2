# SPDX-License-Identifier: Apache-2.0
"""generate without a host in the loop: model, choice of the token and the test for the end are one recorded step.

Stock `generate` decides every token on the host. Here a step writes its token into a buffer on the device, and the host
reads blocks of tokens while the next ones are being made. Fewer options than stock `generate`, the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uncomp.hf.choice import Choice
from uncomp.hf.reader import Fetch, Reader
from uncomp.hf.shared import SharedState
from uncomp.hf.step import Step

BLOCK = 16  # tokens that the host reads at once


def check_prompt(ids: Tensor, mask: Tensor | None, most: int, seen: int = 0) -> None:
    """Refuses what cannot be a prompt behind `seen` columns of a cache."""
    if not isinstance(ids, Tensor) or not isinstance(mask, (Tensor, type(None))):
        got = f"{type(ids).__name__} and {type(mask).__name__}"
        raise ValueError(f"uncomp.generate: input_ids and attention_mask must be tensors; got {got}")
    if ids.dim() != 2 or ids.numel() == 0 or ids.dtype != torch.int64:
        got = f"{list(ids.shape)} {ids.dtype}"
        raise ValueError(f"uncomp.generate: input_ids must be [B, S] int64 with at least one token; got {got}")
    wanted = [ids.shape[0], seen + ids.shape[1]]
    if mask is not None and list(mask.shape) != wanted:
        behind = f"{seen} columns of the cache and those of input_ids" if seen else "as input_ids is"
        raise ValueError(f"uncomp.generate: attention_mask must be {wanted} {behind}; got {list(mask.shape)}")
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"uncomp.generate: max_new_tokens must be an integer of at least 1; got {most!r}")


class Loop:
    """Generates with one patched model."""

    def __init__(self, model: torch.nn.Module, step: Step, enter: Callable[[SharedState | None], None]) -> None:
        """enter: tells the patched model which cache's forward this thread is in."""
        self.model, self.step, self.enter = model, step, enter
        self._mask: Tensor | None = None

    @torch.no_grad()
    def run(
        self,
        ids: Tensor,
        mask: Tensor | None,
        cache: Any,
        choice: Choice,
        most: int,
        on_tokens: Callable[[Tensor], None] | None,
        *,
        ahead: bool = True,
    ) -> Tensor:
        """See `PatchHandle.generate`.

        Args:
            ids: [B, S] int64. mask: [B, columns of the cache + S] or None. cache: an empty one, or one of ours.
            most: new tokens, at least 1.
            ahead: make steps before it is known whether the last ones were the end: what they store stays in the cache.
        Returns:
            [B, S + n] int64, n <= most.
        """
        batch, columns = ids.shape
        seen = cache.get_seq_length()
        positions = torch.arange(seen, seen + columns, device=ids.device).expand(batch, -1)
        if mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = choice(out.logits[:, -1])
        reader = Reader(choice.eos, on_tokens)
        if not reader.take(token.cpu()) and most > 1:
            self._mask = mask if self.step.why_not is not None else None
            ended, positions = self._ends(token, choice), positions[:, -1:] + 1
            self._steps(cache, token, ended, positions, choice, most - 1, reader, ahead)
        return torch.cat([ids, torch.cat(reader.blocks, 1).to(ids.device)], 1)

    def _steps(
        self,
        cache: Any,
        token: Tensor,
        ended: Tensor,
        positions: Tensor,
        choice: Choice,
        most: int,
        reader: Reader,
        ahead: bool,
    ) -> None:
        """Makes tokens block by block; a block is read while the next one is made, or before with `ahead` False."""
        shared: SharedState = cache.uncomp
        values = {"states": token, "positions": positions, "ended": ended}
        inputs, waiting = None, None
        issued, over = 0, False
        watch = not ahead and bool(choice.eos)
        while issued < most:
            count = min(BLOCK, most - issued)
            buffer: list[Tensor] = []
            made = 0
            while made < count and not over:
                graph = self._prepare(shared, token, choice)
                if graph.inputs is not inputs:  # another recording goes on where the last one stopped
                    source = inputs if inputs is not None else values
                    for name in values:
                        graph.inputs[name].copy_(source[name])
                    inputs = graph.inputs
                inputs["count"].zero_()
                free = shared.free_slots()
                run = min(count - made, 1 if watch or not graph.kept else count, count if free is None else free)
                self.enter(shared)
                try:
                    for _ in range(run):
                        self.step.replay(graph, shared)
                except BaseException:
                    shared.clock.abandon()
                    raise
                finally:
                    self.enter(None)
                shared.clock.advance(run)
                buffer.append(inputs["tokens"][:run].t())
                made += run
                over = watch and bool(inputs["ended"].all())
                if made < count:
                    buffer[-1] = buffer[-1].clone()  # the next run writes over it
            issued += count
            block = Fetch(torch.cat(buffer, 1))
            arrived, waiting = (waiting, block) if ahead else (block, None)
            if arrived is not None and reader.take(arrived.read()):
                return
        if waiting is not None:
            reader.take(waiting.read())

    def _prepare(self, shared: SharedState, token: Tensor, choice: Choice):
        batch, device, static = token.shape[0], token.device, self.step.static

        def make() -> tuple[dict[str, Tensor], Callable[[], Any]]:
            position = shared.clock.position(device)
            inputs = {
                "states": static((batch, 1), torch.int64, device),
                "positions": static((batch, 1), torch.int64, device),
                "ended": static((batch, 1), torch.bool, device),
                "tokens": static((BLOCK, batch), torch.int64, device),
                "count": static((1,), torch.int64, device),
            }

            def one() -> None:
                out = self.model(
                    input_ids=inputs["states"],
                    attention_mask=self._whole_mask(shared),
                    position_ids=inputs["positions"],
                    past_key_values=self.step.active().cache(),
                    use_cache=True,
                    logits_to_keep=1,
                )
                chosen = choice(out.logits[:, -1])
                chosen = torch.where(inputs["ended"], choice.pad, chosen)
                inputs["ended"].logical_or_(self._ends(chosen, choice))
                inputs["states"].copy_(chosen)
                inputs["tokens"].index_copy_(0, inputs["count"], chosen.t())
                inputs["count"].add_(1)
                inputs["positions"].add_(1)
                position.add_(1)

            return inputs, one

        shared.clock.begin(batch, 1, None, None)
        self.enter(shared)
        try:
            with self.step.recordings.lock:
                obstacle = self.step.obstacle(shared, self.model)
                return self.step.prepare(("loop", batch, choice), shared, make, self.model, obstacle)
        finally:
            self.enter(None)

    def _whole_mask(self, shared: SharedState) -> Tensor | None:
        """[B, columns + 1] for layers that keep transformers' own cache, and so its padding; such steps are never
        recorded. Compressed layers store no padding."""
        if self._mask is None:
            return None
        new = shared.clock.columns + 1 - self._mask.shape[1]
        return torch.cat([self._mask, self._mask.new_ones(self._mask.shape[0], new)], 1)

    @staticmethod
    def _ends(token: Tensor, choice: Choice) -> Tensor:
        found = torch.zeros_like(token, dtype=torch.bool)
        for eos in choice.eos:
            found = found | (token == eos)
        return found
