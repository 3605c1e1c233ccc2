# SPDX-License-Identifier: Apache-2.0
"""Where a model's projections are, whether they can be replaced, and how its keys are rotated."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.models import describe, family_of
from uncomp.transforms.lorc.modules import SplitProjections

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of weights
FUSED = "qkv_proj"  # one module for the first three, its rows in this order
_HOST_ROPE = ("dynamic", "longrope")
_PLACES = (0, 1, 7, 1000)  # positions at which a rotation that is none shows nothing


def makes_ordinary_tensors(function: Callable) -> Callable:
    """What `function` makes serves where gradients are on too, and can be moved, whatever mode it is called in."""
    return torch.inference_mode(False)(torch.no_grad()(function))


class Places:
    """The attention modules of a model whose caches can be compressed.

    Attributes:
        stack: the module that owns the decoder layers.
        layers: their indices in the model. shape: sizes of the model.

    Raises:
        NotImplementedError: the model's family is not known or cannot be compressed, with the reason.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
            raise TypeError(f"uncomp.lorc: model must be a model of transformers; got {type(model).__name__}")
        self.family = family_of(model.config)
        facts = describe(model.config, UncompConfig(skip_sliding=True))
        self.model, self.stack = model, self.family.text_stack(model)
        self.shape, self.layers = facts.shape, facts.managed

    def attention(self, index: int) -> torch.nn.Module:
        """The attention module of layer `index` of the model."""
        return self.family.attention(self.stack.layers[index])

    def fused(self, attention: torch.nn.Module) -> bool:
        """Whether queries, keys and values of a layer come from one module."""
        return not hasattr(attention, "k_proj") and getattr(attention, FUSED, None) is not None

    def holder(self, attention: torch.nn.Module, name: str) -> torch.nn.Module:
        """The module that has `name` once a layer is compressed."""
        inside = name != "o_proj" and isinstance(getattr(attention, FUSED, None), SplitProjections)
        return getattr(attention, FUSED) if inside else attention

    def projection(self, attention: torch.nn.Module, name: str) -> torch.nn.Linear:
        """A projection of a layer that is not compressed; of a fused one its part, in the same memory."""
        if name == "o_proj" or not self.fused(attention):
            return getattr(attention, name)
        whole, (start, end) = getattr(attention, FUSED), self.rows(name)
        part = torch.nn.Linear(whole.in_features, end - start, bias=whole.bias is not None, device="meta")
        for key in ("weight", "bias"):
            held = getattr(whole, key)
            if held is not None:
                setattr(part, key, torch.nn.Parameter(held.detach()[start:end], requires_grad=False))
        return part

    def rows(self, name: str) -> tuple[int, int]:
        """First row of a part of a fused projection, and the one behind its last."""
        queries, keys = (n * self.shape.head_dim for n in (self.shape.num_q_heads, self.shape.num_kv_heads))
        start = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys}[name]
        return start, start + (queries if name == "q_proj" else keys)

    def check(self) -> None:
        """Refuses projections that cannot be replaced.

        Raises:
            NotImplementedError: names the layer, the projection and why.
        """
        uses = Counter(
            p.data_ptr()  # parts of one matrix (hf/joined.py) are no ties
            for _, p in self.model.named_parameters(remove_duplicate=False)
            if p.device.type != "meta"
        )
        for index in self.layers:
            attention = self.attention(index)
            names = (FUSED, "o_proj") if self.fused(attention) else NAMES
            for name in names:
                where = f"uncomp.lorc: {name} of layer {index} of {type(attention).__name__}"
                self._check_one(where, getattr(attention, name, None), uses)
            if names[0] == FUSED and getattr(attention, FUSED).out_features != self.rows("v_proj")[1]:
                wide, got = self.rows("v_proj")[1], getattr(attention, FUSED).out_features
                raise NotImplementedError(
                    f"uncomp.lorc: {FUSED} of layer {index} of {type(attention).__name__} must give {wide} channels, "
                    f"queries, keys and values; got {got}"
                )

    def check_finite(self) -> None:
        """Refuses projections that have no singular values, or that would spread NaN over what they are folded into.

        Raises:
            ValueError: names the layer and the projection.
        """
        for index in self.layers:
            for name in NAMES:
                found = self.projection(self.attention(index), name)
                for what, held in ((name, found.weight), (f"bias of {name}", found.bias)):
                    if held is not None and not held.isfinite().all():
                        raise ValueError(f"uncomp.lorc: {what} of layer {index} must be finite; got NaN or infinity")

    @staticmethod
    def _check_one(where: str, found: Any, uses: Counter) -> None:
        if found is None:
            raise NotImplementedError(f"{where} is missing; the attention must have {', '.join(NAMES)} or {FUSED}")
        if type(found) is not torch.nn.Linear:
            raise NotImplementedError(
                f"{where} is a {type(found).__name__} of {type(found).__module__}; only torch.nn.Linear can be split, "
                "not quantised or adapted weights"
            )
        if found._forward_hooks or found._forward_pre_hooks:
            raise NotImplementedError(f"{where} has forward hooks, which its factors would not call; remove them first")
        weight = found.weight
        if weight.dtype not in DTYPES:
            raise NotImplementedError(f"{where} must be float32, float16 or bfloat16; got {weight.dtype}")
        if weight.device.type == "meta":
            raise NotImplementedError(f"{where} is not in memory (offloaded); load the model without offloading")
        if uses[weight.data_ptr()] > 1:
            raise NotImplementedError(f"{where} shares its weight with another module; tied weights cannot be split")

    def angles(self, attention: torch.nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The model's own rotary embedding for one layer: (like, position [1, n]) to cos and sin [1, n, rotated].

        Raises:
            NotImplementedError: its frequencies change with the length of the text.
        """
        rotary, layer_type = self.rotary(attention)
        return rotary if layer_type is None else functools.partial(_typed_angles, rotary, layer_type)

    def rotary(self, attention: torch.nn.Module) -> tuple[Any, str | None]:
        """The model's rotary embedding, and the kind of layer where it wants to know that; refuses as `angles` does."""
        rope = getattr(self.model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
        kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
        if kinds & set(_HOST_ROPE):
            raise NotImplementedError(
                f"uncomp.lorc: rotary embeddings of type {', '.join(kinds & set(_HOST_ROPE))} change with the length, "
                "so stored keys cannot be rotated again"
            )
        rotary = self.stack.rotary_emb
        typed = "layer_type" in inspect.signature(rotary.forward).parameters
        return rotary, attention.layer_type if typed else None

    def rotates(self, attention: torch.nn.Module) -> bool:
        """Whether positions change a layer's keys."""
        weight = self.projection(attention, "k_proj").weight
        place = torch.tensor([_PLACES], device=weight.device)
        cos, sin = self.angles(attention)(weight.new_zeros(1, dtype=torch.float32), place)
        return bool((cos != 1).any() or (sin != 0).any())


def _typed_angles(rotary: Any, layer_type: str, like: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    return rotary(like, position, layer_type)
