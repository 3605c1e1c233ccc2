# SPDX-License-Identifier: Apache-2.0
"""Long prompts go through the MLPs in chunks of tokens, so that their activations do not set the peak of a prefill.

An MLP treats every token alone, so chunks are exact; at the sizes of a chunk its products run at full speed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

CHUNK = 8192  # tokens


class ChunkedMlps:
    """Stands in for the forwards of MLPs until it is removed.

    Args:
        modules: the MLPs, each from [B, S, E] to [B, S, E].
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self._undo = [self._wrap(module) for module in modules]

    def remove(self) -> None:
        """Gives back every forward that nobody wrapped since; the others hand calls on, in one piece."""
        for module, ours, before in self._undo:
            ours.whole = True
            if vars(module).get("forward") is not ours:
                continue
            if before is None:
                del module.forward
            else:
                module.forward = before
        self._undo = []

    @staticmethod
    def _wrap(module: torch.nn.Module):
        before, forward = vars(module).get("forward"), module.forward

        @functools.wraps(forward)
        def ours(*args, **kwargs) -> Tensor:
            states = args[0] if len(args) == 1 and not kwargs else None
            if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[0] * states.shape[1] <= CHUNK:
                return forward(*args, **kwargs)
            if ours.whole or torch.is_grad_enabled() or _watched(module):
                return forward(*args, **kwargs)
            out = torch.empty_like(states)
            step = max(1, CHUNK // states.shape[0])
            for begin in range(0, states.shape[1], step):
                out[:, begin : begin + step] = forward(states[:, begin : begin + step])
            return out

        ours.whole, ours.uncomp = False, True
        module.forward = ours
        return module, ours, before


def _watched(module: torch.nn.Module) -> bool:
    """Whether a hook inside would see chunks where it expects a prompt."""
    inner = (m for m in module.modules() if m is not module)
    return any(m._forward_hooks or m._forward_pre_hooks for m in inner)
