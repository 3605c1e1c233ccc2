# SPDX-License-Identifier: Apache-2.0
"""What tells two models of one shape apart, such as a base model and one tuned from it."""

from __future__ import annotations

import hashlib

import torch

SAMPLES = 16  # values of each parameter


def weights_hash(model: torch.nn.Module) -> str:
    """Fingerprint of a model's weights as they are loaded: names, shapes and some spread values of all parameters.

    Args:
        model: on any device, of any dtype; another dtype gives another hash.
    Returns:
        12 hex digits. Cost: one small read from the device.
    """
    found = hashlib.sha256()
    values = []
    for name, weight in model.named_parameters():
        found.update(f"{name} {tuple(weight.shape)}\n".encode())
        flat = weight.detach().reshape(-1)
        values.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float())
    by_device = {value.device for value in values}
    for device in sorted(by_device, key=str):
        found.update(torch.cat([v for v in values if v.device == device]).cpu().numpy().tobytes())
    return found.hexdigest()[:12]
