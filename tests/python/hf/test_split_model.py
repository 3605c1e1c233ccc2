# SPDX-License-Identifier: Apache-2.0
"""Layers on two devices, without a second one: those behind lie on "meta", where tensors have a device and no data.

A mixture of devices fails there as on two GPUs. What must come back from the second device cannot be tried so: see
test_devices.py.
"""

import pytest
import torch
from torch.utils._pytree import tree_map_only

import uncomp
from uncomp import ops
from uncomp.testing import tiny_model

COLUMNS, KEPT = 199, 64


def moved_first(module, device):
    """Inputs move when the forward begins, behind all hooks: as accelerate does it."""
    forward = module.to(device).forward

    def there(*args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))
        return forward(*args, **kwargs)

    module.forward = there


@pytest.fixture(scope="module")
def split():
    model = tiny_model("llama")
    for module in (*model.model.layers[2:], model.model.norm, model.lm_head):
        moved_first(module, "meta")
    return model


@pytest.fixture(autouse=True)
def one_device_an_operator(monkeypatch):
    """Fake kernels do not look at devices; the real ones refuse a mixture."""

    def strict(operator):
        def call(*args, **kwargs):
            devices = set()
            tree_map_only(torch.Tensor, lambda tensor: devices.add(tensor.device), (args, kwargs))
            assert len(devices) == 1, (operator.__name__, devices)
            return operator(*args, **kwargs)

        return call

    for name, value in vars(ops).items():
        if getattr(value, "__module__", None) == ops.__name__ and not isinstance(value, type):
            monkeypatch.setattr(ops, name, strict(value))


@pytest.mark.parametrize("padding", [0, 60])
@pytest.mark.parametrize("policy", ["uncomp", "snapkv", "adakv"])
@pytest.mark.parametrize("stages", [None, [0, 1, 2, 3], [0, 1], [0, 2], [0, 3]])
@torch.no_grad()
def test_every_layer_stores_where_it_lies(split, stages, policy, padding):
    prefill = None if stages is None else {"stages": stages, "n_min": 48}
    mask = torch.ones(2, COLUMNS, dtype=torch.int64)
    mask[1, :padding] = 0
    ids = torch.randint(3, 190, (2, COLUMNS), generator=torch.Generator().manual_seed(1))
    with uncomp.patch(split, uncomp.UncompConfig(policy=policy, budget=KEPT, prefill=prefill)):
        out = split(
            ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=True, logits_to_keep=1
        )
    assert out.logits.shape == (2, 1, split.config.vocab_size)
    layers = [layer.ragged for layer in out.past_key_values.layers]
    assert [layer.key_rows.device.type for layer in layers] == ["cpu", "cpu", "meta", "meta"]
    assert [layer.slot_position.device.type for layer in layers] == ["cpu", "cpu", "meta", "meta"]
