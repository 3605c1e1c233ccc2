# SPDX-License-Identifier: Apache-2.0
"""generate without a host in the loop: model, choice of the token and the test for the end are one recorded step.

Stock `generate` decides every token on the host. Here a step writes its token into a buffer on the device, and the host
reads blocks of tokens while the next ones are being made. Fewer options than stock `generate`, the same tokens.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uncomp.hf.shared import SharedState
from uncomp.hf.step import Step

BLOCK = 16  # tokens that the host reads at once
COLDEST = 1e-4  # temperature below which logits overflow
# What stock generate reads from a model's generation_config and this loop does not apply.
_NOT_APPLIED = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "min_length",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
)


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

        def number(value: Any, kind: type | tuple[type, ...]) -> bool:
            return isinstance(value, kind) and not isinstance(value, bool)

        require("do_sample", isinstance(self.do_sample, bool), "True or False")
        warm = number(self.temperature, (int, float)) and COLDEST <= self.temperature < float("inf")
        require("temperature", warm, f"a number of at least {COLDEST} (do_sample=False for the most likely token)")
        require("top_k", number(self.top_k, int) and self.top_k >= 0, "an integer of at least 0 (0: all tokens)")
        require("top_p", number(self.top_p, (int, float)) and 0 < self.top_p <= 1, "a number in (0, 1]")

    def __call__(self, logits: Tensor) -> Tensor:
        """[B, 1] int64 from [B, V] of any float type. Reads nothing back, so that it can be recorded."""
        if not self.do_sample:
            return logits.argmax(-1, keepdim=True)
        logits = logits.float() / self.temperature
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


def choice_for(model: torch.nn.Module, *, eos_token_id: Any, pad_token_id: Any, **options: Any) -> Choice:
    """A Choice whose end and padding tokens default to the model's, the padding then to the first end token, then 0.

    Warns:
        UserWarning: the model's generation_config asks for something that is not applied here.
    """
    defaults = model.generation_config
    for name in _NOT_APPLIED:
        value = getattr(defaults, name, None)
        if value is not None and value != 0 and value != 1.0:
            warnings.warn(
                f"uncomp.generate: {name}={value!r} of the model's generation_config is not applied; "
                "the model's own generate applies it",
                stacklevel=4,
            )
    eos = defaults.eos_token_id if eos_token_id is None else eos_token_id
    if isinstance(eos, Tensor):
        eos = eos.flatten().tolist()
    several = isinstance(eos, (list, tuple))
    eos = () if eos is None else tuple(_token("eos_token_id", t) for t in (eos if several else (eos,)))
    pad = defaults.pad_token_id if pad_token_id is None else pad_token_id
    pad = (eos[0] if eos else 0) if pad is None else _token("pad_token_id", pad)
    return Choice(eos=eos, pad=pad, **options)


def _token(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"uncomp.generate: {name} must be a token id; got {value!r}") from None


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
    ) -> Tensor:
        """See `PatchHandle.generate`.

        Args:
            ids: [B, S] int64. mask: [B, columns of the cache + S] or None. cache: an empty one, or one of ours.
            most: new tokens, at least 1.
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
        reader = _Reader(choice, on_tokens)
        if not reader.take(token.cpu()) and most > 1:
            self._mask = mask if self.step.why_not is not None else None
            self._steps(cache, token, self._ends(token, choice), positions[:, -1:] + 1, choice, most - 1, reader)
        return torch.cat([ids, torch.cat(reader.blocks, 1).to(ids.device)], 1)

    def _steps(
        self,
        cache: Any,
        token: Tensor,
        ended: Tensor,
        positions: Tensor,
        choice: Choice,
        most: int,
        reader: _Reader | None,
    ) -> None:
        """Makes tokens block by block; a block is read while the next one is made."""
        shared: SharedState = cache.uncomp
        values = {"states": token, "positions": positions, "ended": ended}
        inputs, waiting = None, None
        issued = 0
        while issued < most:
            count = min(BLOCK, most - issued)
            buffer: list[Tensor] = []
            made = 0
            while made < count:
                graph = self._prepare(shared, token, choice)
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
            waiting = _Fetch(torch.cat(buffer, 1))
            if reader is not None and arrived is not None and reader.take(arrived.read()):
                return
        if reader is not None:
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


class _Reader:
    """Takes tokens in on the host, up to the one with which the last sequence ends."""

    def __init__(self, choice: Choice, on_tokens: Callable[[Tensor], None] | None) -> None:
        self.blocks: list[Tensor] = []
        self._eos = torch.tensor(choice.eos, dtype=torch.int64, device="cpu")
        self._on_tokens = on_tokens
        self._ended: Tensor | None = None  # [B, 1]

    def take(self, tokens: Tensor) -> bool:
        """Takes a block [B, n]; True if every sequence has ended."""
        hit = torch.isin(tokens, self._eos)
        if self._ended is not None:
            hit[:, :1] |= self._ended
        hit = hit.cumsum(1) > 0
        self._ended, done = hit[:, -1:], hit.all(0)
        over = bool(done.any())
        if over:
            tokens = tokens[:, : int(done.int().argmax()) + 1]
        self.blocks.append(tokens)
        if self._on_tokens is not None:
            self._on_tokens(tokens)
        return over


class _Fetch:
    """Tokens on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens, self._event = tokens, None
        if tokens.is_cuda:
            there = torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=True)
            self._tokens = there.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tokens.device))  # the current device may be another one

    def read(self) -> Tensor:
        """Waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens
