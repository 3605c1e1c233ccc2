# SPDX-License-Identifier: Apache-2.0
"""How a layer turns and normalises its keys, in numbers that a kernel takes: key = rotate(rms_norm(key) * weight).

Read from the model's own modules, and checked against what these compute; where they compute something else, the reason
in words. Reads back from the device a few times a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uncomp.latent import KeyConstants

_PLACES = (0, 1, 7, 1000, 65536)  # positions at which formula and module are compared
_CLOSE = 1e-4  # absolute, on cosines, and on normalised keys of unit size


def key_constants(rotary: Any, layer_type: str | None, norm: Any, head_dim: int) -> KeyConstants | str:
    """What a kernel must know to make a layer's keys, or why none can.

    Args:
        rotary: the model's rotary embedding. layer_type: of the layer, where the embedding wants it.
        norm: module that normalises keys, or None. head_dim: D.
    """
    prefix = "" if layer_type is None else f"{layer_type}_"
    frequency = getattr(rotary, f"{prefix}inv_freq", None)
    if not isinstance(frequency, Tensor):
        return f"{type(rotary).__name__} keeps no frequencies (inv_freq)"
    frequency = frequency.detach().float()
    scale = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    if not _turns_so(rotary, layer_type, frequency, scale, head_dim):
        return f"{type(rotary).__name__} is no rotation by constant frequencies"
    if norm is None:
        return KeyConstants(frequency, scale, None, 0.0)
    found = _rms(norm, head_dim)
    if found is None:
        return f"{type(norm).__name__} of keys is no RMS norm"
    return KeyConstants(frequency, scale, *found)


def _turns_so(rotary: Any, layer_type: str | None, frequency: Tensor, scale: float, head_dim: int) -> bool:
    place = torch.tensor([_PLACES], device=frequency.device)
    like = frequency.new_zeros(1)
    cos, sin = rotary(like, place) if layer_type is None else rotary(like, place, layer_type)
    angle = place[0].unsqueeze(1).float() * frequency
    if cos.shape != (1, len(_PLACES), 2 * angle.shape[1]) or cos.shape[2] > head_dim:
        return False
    pairs = ((cos, angle.cos()), (sin, angle.sin()))
    return all(bool(torch.allclose(a[0], torch.cat((b, b), -1) * scale, atol=_CLOSE)) for a, b in pairs)


def _rms(norm: Any, head_dim: int) -> tuple[Tensor, float] | None:
    """Factor of each channel and epsilon, if the module is x / sqrt(mean x² + eps) * weight; Gemma's is 1 + weight."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float):
        return None
    probe = torch.randn(4, head_dim, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    probe = probe.to(next((p.device for p in norm.parameters()), probe.device))
    probe = torch.cat((torch.ones_like(probe[:1]), probe, probe[:1] * 1e-3))  # the last is small, so that eps counts
    with torch.no_grad():
        got = norm(probe).float()
    unit = probe * torch.rsqrt(probe.square().mean(-1, keepdim=True) + eps)
    weight = got[0] / unit[0]
    close = torch.allclose(got, unit * weight, rtol=1e-3, atol=_CLOSE)
    return (weight, eps) if close else None
