# SPDX-License-Identifier: Apache-2.0
"""Tokens on their way from the device to the caller, in blocks, up to the one with which the last sequence ends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Reader:
    """Takes tokens in on the host.

    Args:
        eos: tokens that end a sequence. on_tokens: called with every block.
    """

    def __init__(self, eos: tuple[int, ...], on_tokens: Callable[[Tensor], None] | None) -> None:
        self.blocks: list[Tensor] = []
        self._eos = torch.tensor(eos, dtype=torch.int64, device="cpu")
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


class Fetch:
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
