# SPDX-License-Identifier: Apache-2.0
"""The two calls about a CUDA device, where there is none."""

import pytest
import torch

import uncomp


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("device", [None, "cuda", "cuda:1", 0, torch.device("cuda", 0)])
def test_without_a_device(no_device, device):
    """Nothing can have been noted; nothing can be warmed up."""
    assert uncomp.raise_device_errors(device) is None
    with pytest.raises(RuntimeError, match=r"^uncomp.warmup: needs a CUDA device; torch .* sees none$"):
        uncomp.warmup(device)


@pytest.mark.parametrize("call", [uncomp.warmup, uncomp.raise_device_errors])
def test_another_kind_of_device_is_refused(call):
    with pytest.raises(ValueError, match="uncomp: device must be a CUDA device; got cpu"):
        call("cpu")
