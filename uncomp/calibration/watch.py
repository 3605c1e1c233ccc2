# SPDX-License-Identifier: Apache-2.0
"""Spectra of a model's states, taken while its forward runs: inside the attention call, or as a layer is left.

Nothing of a state outlives the call that made it. Importing registers the attention function with transformers.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from uncomp import ops
from uncomp._extension import limits
from uncomp.entropy import head_variance
from uncomp.models import Family

NAME = "uncomp_calibrate"
_WIDEST = limits()["max_spectrum_dim"]
_measuring: weakref.WeakKeyDictionary[torch.nn.Module, Callable] = weakref.WeakKeyDictionary()


def _attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs: Any):
    """transformers' own sdpa, after the module's states were measured."""
    measure = _measuring.get(module)
    if measure is not None:
        measure({"query": query, "key": key, "value": value})
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def spectrum_of(states: Tensor) -> Tensor:
    """All eigenvalues [B, H, D] of the token covariance of states [B, H, S, D], shares of the trace, descending.

    Heads wider than the kernel takes on a GPU go through torch, by the smaller of the two Gram matrices.
    """
    dim = states.shape[3]
    if not states.is_cuda or dim <= _WIDEST:
        return ops.matrix_spectrum(states.contiguous() if states.stride(3) != 1 else states, dim)
    wide = states.float()
    centred = wide - wide.mean(2, keepdim=True)
    norm, size = centred.norm(dim=3, keepdim=True), wide.norm(dim=3, keepdim=True)
    unit = torch.where(norm <= 1e-5 * size, torch.zeros_like(centred), centred / norm)
    gram = unit @ unit.mT if states.shape[2] < dim else unit.mT @ unit
    bad = ~gram.isfinite().all(-1).all(-1)
    values = torch.linalg.eigvalsh(gram.masked_fill(bad[..., None, None], 0)).flip(-1).clamp_min(0)
    values = torch.nn.functional.pad(values, (0, dim - values.shape[-1]))
    total = values.sum(-1, keepdim=True)
    shares = torch.where(total > 0, values / total, torch.zeros_like(values))
    return shares.masked_fill(bad[..., None], float("nan"))


def with_variance(states: Tensor) -> Tensor:
    """[B, H, D + 1]: the eigenvalues of spectrum_of, and behind them the variance of states [B, H, S, D]."""
    return torch.cat([spectrum_of(states).float(), head_variance(states).unsqueeze(-1)], -1)


def unrotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """States [B, H, S, D] before their rotation by cos and sin [B, S, R], R <= D, in float32.

    A factor that the rotary embedding carries, cos^2 + sin^2, is taken out.
    """
    cos, sin, wide = cos.float().unsqueeze(1), sin.float().unsqueeze(1), states.float()
    turned, rest = wide.split((cos.shape[-1], wide.shape[-1] - cos.shape[-1]), -1)
    low, high = turned.chunk(2, -1)
    back = (turned * cos - torch.cat((-high, low), -1) * sin) / (cos.square() + sin.square())
    return torch.cat((back, rest), -1)


@contextlib.contextmanager
def watched(
    model: Any, family: Family, tensor: str, rope: str, measure: Callable[[Tensor], Tensor] = spectrum_of
) -> Iterator[list[Tensor | None]]:
    """A list with one entry a layer, filled with the spectra [B, heads, D] of each forward of the model's decoder.

    Behind the `with` the model is as it was: attention implementation, hooks, training mode; after errors too.

    Args:
        model: a model of transformers. family: its family.
        tensor: "query", "key", "value" or "hidden" (what leaves a layer).
        rope: "after", or "before" for queries and keys without their rotation.
        measure: what is kept of states [B, heads, S, D]: spectrum_of or with_variance.
    Raises:
        NotImplementedError: the model does not take a registered attention function.
    """
    stack = family.text_stack(model)
    found: list[Tensor | None] = [None] * len(stack.layers)
    before, undo = model.config._attn_implementation, []
    training = [module for module in model.modules() if module.training]
    try:
        if tensor == "hidden":
            undo = [layer.register_forward_hook(_leaving(found, i, measure)) for i, layer in enumerate(stack.layers)]
        else:
            model.set_attn_implementation(NAME)
            if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
                raise NotImplementedError(
                    f"uncomp.calibrate: {type(model).__name__} does not take a registered attention implementation"
                )
            for i, layer in enumerate(stack.layers):
                module = family.attention(layer)
                angles: dict[str, Any] = {}
                if rope == "before":
                    undo.append(module.register_forward_pre_hook(_remember(angles), with_kwargs=True))
                _measuring[module] = _measurer(found, i, tensor, angles, measure)
        model.eval()
        yield found
    finally:
        for hook in undo:
            hook.remove()
        for layer in stack.layers:
            _measuring.pop(family.attention(layer), None)
        for module in training:
            module.training = True
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


def _leaving(found: list, index: int, measure: Callable) -> Callable:
    def hook(layer: Any, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found[index] = measure(states.unsqueeze(1))

    return hook


def _remember(angles: dict[str, Any]) -> Callable:
    def hook(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs.get("position_embeddings")
        given = args[1] if given is None and len(args) > 1 else given
        if given is None:
            raise NotImplementedError(f'uncomp.calibrate: rope="before" finds no angles in {type(module).__name__}')
        angles["cos"], angles["sin"] = given

    return hook


def _measurer(found: list, index: int, tensor: str, angles: dict[str, Any], measure: Callable) -> Callable:
    def attended(states: dict[str, Tensor]) -> None:
        chosen = states[tensor]
        found[index] = measure(unrotated(chosen, **angles) if angles else chosen)
        angles.clear()

    return attended
