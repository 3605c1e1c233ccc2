# SPDX-License-Identifier: Apache-2.0
"""What a recorded step depends on beside its inputs, and what forbids to record one at all.

A replay runs kernels and no Python, so a hook would be skipped and a changed flag would not be seen. Both are looked
for once a turn, module by module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
_HOST_ROPE = ("dynamic", "longrope")  # rotary types that choose frequencies on the host, by the longest position
_HARMLESS = "output_capturing_hook"  # transformers' own: does nothing unless outputs are asked for, which is refused
_BASE = set(vars(torch.nn.Module())) - {"training"} | {"warnings_issued"}
_LONGEST = 64  # entries of a container that still counts as a setting


def tensors(root: torch.nn.Module) -> list[Tensor]:
    """Weights and buffers of a module tree, as new views: they keep the memory, not the parameters."""
    return [t.detach() for t in (*root.parameters(), *root.buffers())]


def mark(root: torch.nn.Module) -> tuple:
    """What a recording of a module tree depends on: weights, hooks, wrapped forwards, settings of every module."""
    pointers = tuple(t.data_ptr() for t in (*root.parameters(), *root.buffers()))
    settings = tuple(_settings(module) for module in root.modules())
    return pointers, settings, tuple(foreign(root)), root.config._attn_implementation


def first_weight(root: torch.nn.Module) -> int:
    """Address of one weight: changes when the model is moved."""
    weight = next(root.parameters(), None)
    return 0 if weight is None else weight.data_ptr()


def _settings(module: torch.nn.Module) -> tuple:
    """Plain values among a module's attributes: scales, flags, names of active adapters."""
    found = []
    for name, value in vars(module).items():
        if name in _BASE:
            continue
        if isinstance(value, (bool, int, float, str)):
            found.append((name, value))
        elif isinstance(value, (list, tuple, dict, set)) and len(value) <= _LONGEST:
            plain = value.items() if isinstance(value, dict) else value
            found.append((name, repr([v for v in plain if isinstance(v, (bool, int, float, str, tuple))])))
    return tuple(found)


def forbidden(root: torch.nn.Module, device_type: str, *, whole: bool) -> str | None:
    """Why no step of this module tree can be recorded, in words; None if it can.

    Args:
        device_type: where recordings are possible. whole: the root's own hooks would be skipped too.
    """
    devices = {t.device for t in (*root.parameters(), *root.buffers())}
    if any(device.type != device_type for device in devices):
        return f"the model is not on a {device_type} device"
    if len(devices) > 1:
        return "the model lies on several devices"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "a replay would skip the hook on all modules"
    found = next(foreign(root, whole=whole), None)
    if found is not None:
        return f"a replay would skip the {found}"
    config = root.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    if kinds & set(_HOST_ROPE):
        return f"rotary embeddings of type {', '.join(kinds & set(_HOST_ROPE))} read positions on the host"
    return None


def argument(given: dict[str, Any], config: Any) -> str | None:
    """What a call of a text stack asks for that a replay cannot give, in words; None if nothing."""
    for name, value in given.items():
        if name not in ARGUMENTS and name != "return_dict" and value is not None and value is not False:
            return f"the forward was called with {name}"
    if given.get("return_dict") is False:
        return "the forward was called with return_dict=False"
    if config.output_hidden_states or config.output_attentions:
        return "the model's config asks for hidden states or attention weights"
    return None


def foreign(root: torch.nn.Module, *, whole: bool = False) -> Iterator[str]:
    """Names of hooks and wrapped forwards of a module tree, other than transformers' and our own.

    Args:
        whole: the root's too; else they run around the replay.
    """
    for name, module in root.named_modules():
        if module is root and not whole:
            continue
        where = f"{name or 'model'} ({type(module).__name__})"
        wrapped = vars(module).get("forward")
        if wrapped is not None and not getattr(wrapped, "uncomp", False):
            yield f"wrapped forward of {where}"
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if getattr(hook, "__name__", "") != _HARMLESS and not getattr(hook, "uncomp", False):
                yield f"hook on {where}"
