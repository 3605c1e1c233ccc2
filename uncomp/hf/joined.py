# SPDX-License-Identifier: Apache-2.0
"""Projections of one input are one product in decode steps of several sequences: narrow ones do not fill a GPU.

The weights stay parameters of their modules, as views of one matrix; prompts run on the modules as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # called in this order, with the same tensor


class JoinedProjections:
    """Stands in for the forwards of neighbouring projections until it is removed; a context in which they are joined.

    Args:
        owners: attention modules and MLPs; those whose projections are anything but plain and alike stay as they are.
    """

    def __init__(self, owners: Iterable[torch.nn.Module]) -> None:
        self._gate = _Gate()
        self._joined = [
            _Joined(self._gate, [getattr(owner, name) for name in names])
            for owner in owners
            for names in SIBLINGS
            if _alike([getattr(owner, name, None) for name in names])
        ]

    def __len__(self) -> int:
        return len(self._joined)

    def __enter__(self) -> None:
        for joined in self._joined:
            joined.check()
        self._gate.open = True

    def __exit__(self, *exc: object) -> None:
        self._gate.open = False

    def remove(self) -> None:
        """Gives the modules their forwards back, and a matrix of their own each, with the same values."""
        for joined in self._joined:
            joined.remove()
        self._joined = []


class _Gate:
    """Whether a step runs that may use joined products: others cannot know that their weights are still views."""

    def __init__(self) -> None:
        self.open = False  # of the instance from the start: a compiled step is compiled again when an attribute appears


class _Joined:
    def __init__(self, gate: _Gate, modules: Sequence[torch.nn.Linear]) -> None:
        self.gate, self.modules, self.live = gate, list(modules), True
        self.sizes = [module.out_features for module in modules]
        with torch.no_grad(), torch.inference_mode(False):
            self.weight = torch.cat([module.weight.detach() for module in modules])
            biased = modules[0].bias is not None
            self.bias = torch.cat([module.bias.detach() for module in modules]) if biased else None
            for name, whole in (("weight", self.weight), ("bias", self.bias)):
                for module, part in zip(modules, () if whole is None else whole.split(self.sizes), strict=False):
                    getattr(module, name).data = part
        # Input and results of the last product, while some are not taken: one value, so that threads cannot mix two.
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._forwards = [self._wrap(place, module) for place, module in enumerate(modules)]

    def _wrap(self, place: int, module: torch.nn.Linear) -> Callable[[Tensor], Tensor]:
        inner = module.forward

        @functools.wraps(inner)
        def forward(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not (self.gate.open and self.live) or states.dim() != 3 or states.shape[1] != 1:
                return inner(states, *args, **kwargs)
            if place == 0:
                results = linear(states, self.weight, self.bias).split(self.sizes, -1)
                self._last = states, results
                return results[0]
            last = self._last
            if last is None or last[0] is not states:
                return inner(states, *args, **kwargs)
            if place == len(self.sizes) - 1:
                self._last = None
            return last[1][place]

        forward.uncomp = True
        module.forward = forward
        return forward

    def check(self) -> None:
        """Stops where a module's tensors are no longer views of the joined ones."""
        for name, whole in (("weight", self.weight), ("bias", self.bias)):
            parts = [None] * len(self.modules) if whole is None else whole.split(self.sizes)
            for module, part in zip(self.modules, parts, strict=True):
                mine = getattr(module, name)
                if (mine is None) != (part is None) or (part is not None and mine.data_ptr() != part.data_ptr()):
                    self.live = False

    def remove(self) -> None:
        self.check()
        own, self.live = self.live, False
        for module, forward in zip(self.modules, self._forwards, strict=True):
            if vars(module).get("forward") is forward:
                del module.forward
            if own:
                module.weight.data = module.weight.data.clone()
                if module.bias is not None:
                    module.bias.data = module.bias.data.clone()
        self.weight = self.bias = None


def _alike(modules: Sequence[torch.nn.Module | None]) -> bool:
    """Whether these are plain projections, of one width, type and device, with nothing around them."""
    if not all(type(module) is torch.nn.Linear and _bare(module) for module in modules):
        return False
    kinds = {(m.in_features, m.weight.dtype, m.weight.device, m.bias is None) for m in modules}
    weight = modules[0].weight
    return len(kinds) == 1 and weight.device.type != "meta" and weight.is_floating_point()


def _bare(module: torch.nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return not (hooks or "forward" in vars(module) or hasattr(module, "parametrizations"))
