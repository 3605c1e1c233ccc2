# SPDX-License-Identifier: Apache-2.0
"""The model that most tests of recorded steps use."""

import pytest

from uncomp.testing import tiny_model


@pytest.fixture(scope="module")
def models():
    """The tiny model on every device that a test file asks for."""
    return {}


@pytest.fixture
def model(models, device):
    """The tiny Llama on the test's device; files that need another one define their own."""
    if device not in models:
        models[device] = tiny_model("llama").to(device)
    return models[device]
