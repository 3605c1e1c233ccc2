# SPDX-License-Identifier: Apache-2.0
"""What the order of the heads is worth: one budget, given by profile, prompt, wrong way round, lot, evenly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.eval.perplexity import score, windows


@dataclass(frozen=True)
class OrderScore:
    """One order over all pieces; numbers are means over the pieces, for `random` over its draws too.

    Fields:
        order: "profile", "online", "reverse" (of the profile), "random", "equal" (one group), "full" (nothing dropped).
        loss: mean negative log-likelihood of the continuations, nats a token.
        over_full: loss minus that of the full cache, one number a piece.
        agreement: share of places where the most likely token is that of the full cache.
        divergence: KL from the full cache, nats a token.
        stored: tokens a row kept of the prefix. share: of the prefix.
    """

    order: str
    loss: float
    over_full: tuple[float, ...]
    agreement: float
    divergence: float
    stored: float
    share: float

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss)


def configs(profile: str, budget: int | float, groups: int, scope: str, draws: int) -> dict[str, list[UncompConfig]]:
    """What each order runs; they differ in the order alone.

    Args:
        profile: file or name. budget: as UncompConfig. groups, scope: groups and group_scope. draws: seeds of "random".
    Raises:
        ValueError: as UncompConfig; draws below 1.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"uncomp.calibration: draws must be an integer of at least 1; got {draws!r}")
    common: dict[str, Any] = {"budget": budget, "groups": groups, "group_scope": scope}
    return {
        "profile": [UncompConfig(**common, profile=profile)],
        "online": [UncompConfig(**common)],
        "reverse": [UncompConfig(**common, profile=profile, order="reverse")],
        "random": [UncompConfig(**common, order="random", seed=seed) for seed in range(1, draws + 1)],
        "equal": [UncompConfig(budget=budget, groups=1)],
    }


def study_orders(
    model: torch.nn.Module,
    ids: Tensor,
    profile: str,
    *,
    budget: int | float = 256,
    groups: int = 8,
    scope: str = "model",
    prefix: int = 2048,
    continuation: int = 256,
    pieces: int = 4,
    draws: int = 2,
    mode: str = "chunk",
    progress: Callable[[str], None] | None = None,
) -> list[OrderScore]:
    """Scores continuations of a text after prefixes that are compressed in every order; the full cache comes last.

    Args:
        model: a causal language model, not patched.
        ids: [N] int64, tokens of a text that the profile was not made on.
        profile: file or name of a profile of the model.
        budget, groups, scope: as UncompConfig. prefix, continuation: tokens. pieces: evenly spread over the text.
        draws: random orders. mode: as eval.perplexity.score.
        progress: called with a line of text before every forward.
    Raises:
        ValueError: as UncompConfig, uncomp.patch, eval.perplexity.windows and score.
    Cost: draws + 5 prefills a piece.
    """
    runs = configs(profile, budget, groups, scope, draws)
    cut = windows(ids, prefix, continuation, pieces)
    count = sum(map(len, runs.values())) + 1
    numbers: dict[str, list[list[list[float]]]] = {order: [[] for _ in cut] for order in (*runs, "full")}
    for at, piece in enumerate(cut):
        full, done = None, at * count
        for order, some in (("full", [None]), *runs.items()):
            for config in some:
                if progress is not None:
                    progress(f"{done} of {count * len(cut)} runs, piece {at}, {order}")
                each = score(model, *piece, config, mode=mode)
                full = each if full is None else full
                row = (each.loss, each.loss - full.loss, each.agreement(full), each.divergence(full))
                numbers[order][at].append([*row, each.stored_tokens_mean])
                done += 1
    return [_summed(order, numbers[order], prefix) for order in (*runs, "full")]


def _summed(order: str, by_piece: Sequence[Sequence[Sequence[float]]], prefix: int) -> OrderScore:
    """Mean over the draws, then over the pieces."""
    rows = [[math.fsum(values) / len(draws) for values in zip(*draws, strict=True)] for draws in by_piece]
    loss, _, agreement, divergence, stored = (math.fsum(values) / len(rows) for values in zip(*rows, strict=True))
    return OrderScore(order, loss, tuple(row[1] for row in rows), agreement, divergence, stored, stored / prefix)
