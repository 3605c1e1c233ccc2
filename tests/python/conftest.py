# SPDX-License-Identifier: Apache-2.0
"""Devices, seeds and the switch that turns a missing GPU into a failure."""

import importlib.metadata
import os

# A pool of compile workers a test process starts slowly and can outlive its tests.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

import uncomp


def has_gpu() -> bool:
    return torch.cuda.is_available() and uncomp.build_info()["cuda"]


def pytest_configure(config):
    if os.environ.get("UNCOMP_REQUIRE_GPU") and not has_gpu():
        raise pytest.UsageError("UNCOMP_REQUIRE_GPU is set, but torch sees no GPU or uncomp was built without CUDA")


def pytest_report_header():
    """Which releases this run meets; the tests under hf/ run against several."""
    found = []
    for name in ("torch", "transformers", "accelerate", "gguf"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return "with " + ", ".join(found)


def pytest_collection_modifyitems(items):
    if has_gpu():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Every test that takes it runs on the CPU and, marked gpu, on the first GPU."""
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_device_error_left(request):
    """A kernel that noted a violation which its test did not expect fails that test."""
    yield
    if "gpu" in request.keywords and has_gpu():
        uncomp.raise_device_errors()
