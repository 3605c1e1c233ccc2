# SPDX-License-Identifier: Apache-2.0
"""generate without a host in the loop: model, choice of the token and the test for the end are one recorded step.

Stock `generate` decides every token on the host. Here a step writes its token into a buffer on the device, and the host
reads blocks of tokens while the next ones are being made. Fewer options than stock `generate`, the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uncomp.hf.shared import SharedState
from uncomp.hf.step import Step

BLOCK = 16  # tokens that the host reads at once


@dataclass(frozen=True)
class Choice:
    """How a token is chosen from logits.

    Args:
        do_sample: draw from the distribution; else the most likely token.
        temperature: divides the logits, > 0.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens that make up this share, in (0, 1].
        eos: tokens that end a sequence. pad: what a sequence that has ended is filled with.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos: tuple[int, ...] = ()
    pad: int = 0

    def __post_init__(self) -> None:
        def require(name: str, ok: bool, wanted: str) -> None:
            if not ok:
                raise ValueError(f"uncomp.generate: {name} must be {wanted}; got {getattr(self, name)!r}")

        require("do_sample", isinstance(self.do_sample, bool), "True or False")
        require("temperature", self.temperature > 0, "above 0 (do_sample=False for the most likely token)")
        require("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "an integer of at least 0 (0: all tokens)")
        require("top_p", 0 < self.top_p <= 1, "in (0, 1]")

    def __call__(self, logits: Tensor) -> Tensor:
        """[B, 1] int64 from [B, V] float32. Reads nothing back, so that it can be recorded."""
        if not self.do_sample:
            return logits.argmax(-1, keepdim=True)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        share = logits.softmax(-1)
        if self.top_p < 1:
            ordered, index = share.sort(descending=True)
            before = ordered.cumsum(-1) - ordered  # the first token always stays
            share = share.masked_fill((before >= self.top_p).gather(-1, index.argsort(-1)), 0.0)
        # The largest of share / exponential noise: a draw without torch.multinomial, which reads its input back.
        return (share / torch.empty_like(share).exponential_()).argmax(-1, keepdim=True)


def choice_for(model: torch.nn.Module, *, eos_token_id: Any, pad_token_id: int | None, **options: Any) -> Choice:
    """A Choice whose end and padding tokens default to the model's, the padding then to the first end token, then 0."""
    defaults = model.generation_config
    eos = defaults.eos_token_id if eos_token_id is None else eos_token_id
    eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(int(token) for token in eos)
    pad = defaults.pad_token_id if pad_token_id is None else pad_token_id
    return Choice(eos=eos, pad=(eos[0] if eos else 0) if pad is None else pad, **options)


def check_prompt(ids: Tensor, mask: Tensor | None, most: int) -> None:
    """Refuses what cannot be a prompt."""
    if ids.dim() != 2 or ids.numel() == 0 or ids.dtype != torch.int64:
        got = f"{list(ids.shape)} {ids.dtype}"
        raise ValueError(f"uncomp.generate: input_ids must be [B, S] int64 with at least one token; got {got}")
    if mask is not None and mask.shape != ids.shape:
        wanted, got = list(ids.shape), list(mask.shape)
        raise ValueError(f"uncomp.generate: attention_mask must be {wanted} as input_ids is; got {got}")
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"uncomp.generate: max_new_tokens must be an integer of at least 1; got {most!r}")


class Loop:
    """Generates with one patched model."""

    def __init__(self, model: torch.nn.Module, step: Step, enter: Callable[[SharedState | None], None]) -> None:
        """enter: tells the patched model which cache's forward this thread is in."""
        self.model, self.step, self.enter = model, step, enter

    @torch.no_grad()
    def run(
        self,
        ids: Tensor,
        mask: Tensor | None,
        cache: Any,
        choice: Choice,
        most: int,
        on_tokens: Callable[[Tensor], None] | None,
    ) -> Tensor:
        """See `PatchHandle.generate`.

        Args:
            ids: [B, S] int64. mask: [B, S] or None. cache: an empty cache. most: new tokens, at least 1.
        Returns:
            [B, S + n] int64, n <= most.
        """
        batch, columns = ids.shape
        positions = torch.arange(columns, device=ids.device).expand(batch, -1)
        if mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = choice(out.logits[:, -1].float())
        ended = self._ends(token, choice)
        blocks = [token.cpu()]
        if on_tokens is not None:
            on_tokens(blocks[0])
        if most > 1 and not (choice.eos and bool(ended.all())):
            blocks += self._steps(cache, token, ended, positions[:, -1:] + 1, choice, most - 1, on_tokens)
        new = torch.cat(blocks, 1)
        if choice.eos:  # blocks may go on after the last sequence ended
            hit = torch.isin(new, torch.tensor(choice.eos)).int().cumsum(1) > 0
            done = hit.all(0)
            new = new[:, : int(done.int().argmax()) + 1] if bool(done.any()) else new
        return torch.cat([ids, new.to(ids.device)], 1)

    def _steps(
        self,
        cache: Any,
        token: Tensor,
        ended: Tensor,
        positions: Tensor,
        choice: Choice,
        most: int,
        on_tokens: Callable[[Tensor], None] | None,
    ) -> list[Tensor]:
        """Tokens [B, n] on the host, block by block; a block is read while the next one is made."""
        shared: SharedState = cache.uncomp
        values = {"states": token, "positions": positions, "ended": ended}
        inputs, blocks, waiting = None, [], None
        issued = 0
        while issued < most:
            count = min(BLOCK, most - issued)
            buffer: list[Tensor] = []
            made = 0
            while made < count:
                graph = self._prepare(shared, cache, token, choice)
                if graph.inputs is not inputs:  # another recording goes on where the last one stopped
                    source = inputs if inputs is not None else values
                    for name in values:
                        graph.inputs[name].copy_(source[name])
                    inputs = graph.inputs
                inputs["count"].zero_()
                free = shared.free_slots()
                run = min(count - made, 1 if not graph.kept else count, count if free is None else free)
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
                if made < count:
                    buffer[-1] = buffer[-1].clone()  # the next run writes over it
            issued += count
            arrived = waiting
            waiting = _Fetch(torch.cat(buffer, 1), inputs["ended"])
            if arrived is not None and self._take(arrived, blocks, on_tokens, choice):
                return blocks
        self._take(waiting, blocks, on_tokens, choice)
        return blocks

    @staticmethod
    def _take(fetch: _Fetch, blocks: list[Tensor], on_tokens, choice: Choice) -> bool:
        """True if every sequence has ended."""
        tokens, ended = fetch.read()
        blocks.append(tokens)
        if on_tokens is not None:
            on_tokens(tokens)
        return bool(choice.eos) and bool(ended.all())

    def _prepare(self, shared: SharedState, cache: Any, token: Tensor, choice: Choice):
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
                    position_ids=inputs["positions"],
                    past_key_values=self.step.active().cache(),
                    use_cache=True,
                    logits_to_keep=1,
                )
                chosen = choice(out.logits[:, -1].float())
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
                return self.step.prepare(("loop", batch, choice), shared, make, self.step.obstacle(shared))
        finally:
            self.enter(None)

    @staticmethod
    def _ends(token: Tensor, choice: Choice) -> Tensor:
        found = torch.zeros_like(token, dtype=torch.bool)
        for eos in choice.eos:
            found = found | (token == eos)
        return found


class _Fetch:
    """Tokens on their way to the host."""

    def __init__(self, tokens: Tensor, ended: Tensor) -> None:
        self._tensors = [tokens, ended]
        self._event = None
        if tokens.is_cuda:
            self._tensors = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in self._tensors
            ]
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._tensors = [t.clone() for t in self._tensors]

    def read(self) -> list[Tensor]:
        """Waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
