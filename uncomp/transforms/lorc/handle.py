# SPDX-License-Identifier: Apache-2.0
"""What was replaced in a compressed model, how it comes back, and what it became."""

from __future__ import annotations

import os
from typing import Any

import torch

from uncomp import latent
from uncomp.transforms.lorc.config import LorcConfig
from uncomp.transforms.lorc.places import Places, makes_ordinary_tensors
from uncomp.transforms.lorc.schedule import Ranks


class LorcHandle:
    """What `compress` did, and how to undo it; usable in a `with`.

    Attributes:
        config: the configuration. ranks: of keys and of values, one a compressible layer.
        layers: which layers of the model these are.
        log_kappa: log condition numbers that the schedule followed, one a layer; empty where none were needed.
    """

    def __init__(
        self, places: Places, config: LorcConfig, ranks: Ranks, log_kappa: list[float], *, keeps: bool = True
    ) -> None:
        self.config, self.ranks, self.layers, self.log_kappa = config, ranks, list(places.layers), list(log_kappa)
        self._places, self._keeps = places, keeps
        self._before: list[tuple[torch.nn.Module, str, torch.nn.Module, torch.device]] = []
        self._bytes = [0, 0]  # of weights before and after
        setattr(places.stack, latent.MARK, self)
        vars(places.model)["save_pretrained"] = _refuse_to_save  # a plain function: copies of the model have it too

    def replace(self, attention: torch.nn.Module, made: dict[str, torch.nn.Module]) -> None:
        """Puts modules in the place of a layer's projections, whose weights move to the host's memory or are let go."""
        for name, module in made.items():
            before = getattr(attention, name)
            device = before.weight.device
            self._bytes[0] += _bytes_of(before)
            self._bytes[1] += _bytes_of(module)  # before it may hold the original
            if self._keeps:
                self._before.append((attention, name, before, device))
            if self.config.exact_prefill:
                module.exact = before
                self._bytes[1] += _bytes_of(before)
            elif self._keeps:
                _move(before, torch.device("cpu"))
            setattr(attention, name, module)

    @makes_ordinary_tensors
    def remove(self) -> None:
        """Gives back the very same weights; a second call does nothing.

        Of a model that was moved meanwhile (`model.to`) they go where the factors are, in the dtype of these.

        Raises:
            RuntimeError: they were not kept.
        """
        if getattr(self._places.stack, latent.MARK, None) is not self:
            return
        if not self._keeps:
            raise RuntimeError("uncomp.lorc: the original weights were not kept; load the model again")
        while self._before:
            attention, name, module, device = self._before.pop()
            like = next(getattr(attention, name).parameters())
            # On "meta" nothing would be left of them: an offloaded model gets them where they were.
            _move(module, device if like.device.type == "meta" else like.device, like.dtype)
            setattr(attention, name, module)
        delattr(self._places.stack, latent.MARK)
        vars(self._places.model).pop("save_pretrained", None)

    def let_go(self) -> None:
        """Frees the replaced weights: from now on the factors cannot be removed."""
        self._keeps, self._before = False, []

    def __enter__(self) -> LorcHandle:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Removes the factors, where the weights were kept."""
        if self._keeps:
            self.remove()

    def stats(self) -> dict[str, Any]:
        """Ranks, the share of key and value channels that is stored, and bytes of the projections before and after.

        kept_share counts layers left as they are with all their channels.
        """
        dim = self._places.shape.head_dim
        wide = [dim if rank is None else rank for rank in (*self.ranks.key, *self.ranks.value)]
        return {
            "layers": list(self.layers),
            "rank_k": list(self.ranks.key),
            "rank_v": list(self.ranks.value),
            "kept_share": sum(wide) / (dim * len(wide)),
            "weight_bytes_before": self._bytes[0],
            "weight_bytes_after": self._bytes[1],
        }

    def save_pretrained(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Writes a checkpoint that `uncomp.lorc.load` reads; see uncomp/transforms/lorc/files.py.

        Args:
            folder: new or empty. tokenizer: written beside the model where it is given; `load` needs one.
        Raises:
            ValueError: the folder holds something already. OSError: it cannot be written.
            RuntimeError: the factors were removed.
            NotImplementedError: prompts run exactly, on weights that a checkpoint of factors does not have.
        """
        from uncomp.transforms.lorc.files import save  # which builds handles

        if getattr(self._places.stack, latent.MARK, None) is not self:
            raise RuntimeError("uncomp.lorc: the factors were removed; compress the model again")
        if self.config.exact_prefill:
            raise NotImplementedError("uncomp.lorc: exact_prefill needs the original weights, which a checkpoint lacks")
        save(self._places, self.config, self.ranks, folder, tokenizer)


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _move(module: torch.nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    for parameter in module.parameters():  # the parameters stay the same objects, with the same bits
        parameter.data = parameter.data.to(device, dtype)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """What `model.save_pretrained` is while a model has factors: from_pretrained would make up the weights it lacks."""
    raise NotImplementedError(
        "uncomp.lorc: model.save_pretrained writes a folder that cannot be loaded again while the projections are of "
        "low rank; use save_pretrained of the handle that compress or attach gave"
    )
