# SPDX-License-Identifier: Apache-2.0
"""The members of transformers that uncomp builds on, on the installed release and on faked ones."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface  # noqa: E402
from transformers.cache_utils import CacheLayerMixin, DynamicLayer  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaModel  # noqa: E402

from uncomp.hf import compat  # noqa: E402

pytestmark = pytest.mark.hf


@pytest.fixture(autouse=True)
def forget():
    """Each test decides anew; what a fake left behind must not reach the next one."""
    compat.check.cache_clear()
    compat._accept.cache_clear()
    yield
    compat.check.cache_clear()
    compat._accept.cache_clear()


def fake_version(monkeypatch, text: str) -> None:
    # Not the name above: importing a model may have put another module object in its place.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", text)


# ---- the installed release
def test_the_installed_release_has_every_member():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.check()
    assert ".".join(map(str, compat.version())) == importlib.metadata.version("transformers")


def test_chunked_turns_follow_the_version(monkeypatch):
    fake_version(monkeypatch, "5.20.2")
    assert not compat.has_chunked_turns()
    fake_version(monkeypatch, "5.21.0")
    assert compat.has_chunked_turns()


# ---- versions
@pytest.mark.parametrize("text", ["4.57.1", "5.9.0", "5.10.0", "6.0.0", "6.0.0rc1", "7.1", "unknown"])
def test_versions_outside_the_range_are_refused(monkeypatch, text):
    fake_version(monkeypatch, text)
    for call in (compat.version, compat.check, compat.has_chunked_turns):
        with pytest.raises(ImportError) as caught:
            call()
        wanted = f"uncomp.hf: transformers {text} is not supported; pip install 'transformers>=5.10.1,<6'"
        assert str(caught.value) == wanted


@pytest.mark.parametrize("text, found", [("5.10.1", (5, 10, 1)), ("5.23.0", (5, 23, 0)), ("5.23.4.dev0", (5, 23, 4))])
def test_versions_in_the_range_pass_in_silence(monkeypatch, text, found):
    fake_version(monkeypatch, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compat.version() == found


def test_a_version_above_the_newest_tested_warns_once(monkeypatch):
    fake_version(monkeypatch, "5.24.0")
    with pytest.warns(UserWarning, match=r"^uncomp.hf: transformers 5.24.0 is newer than 5.23, the newest tested$"):
        compat.version()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.version()
        compat.check()


def test_a_missing_transformers_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"^uncomp.hf: transformers could not be imported .*pip install 'transf[^\n]*$"
    ):
        compat.version()


# ---- faked members
def refused(member: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        compat.check()
    text = str(caught.value)
    assert text.startswith(f"uncomp.hf: transformers {transformers.__version__} has an unknown {member}: wanted ")
    assert "\n" not in text


@pytest.mark.parametrize("owner", [CacheLayerMixin, DynamicLayer])
@pytest.mark.parametrize("member", ["update", "get_mask_sizes", "lazy_initialization", "get_seq_length"])
def test_a_layer_with_other_parameters_is_refused(monkeypatch, owner, member):
    monkeypatch.setattr(owner, member, lambda self, states: None)
    refused(f"{owner.__name__}.{member}")


def test_a_layer_without_a_member_is_refused(monkeypatch):
    monkeypatch.delattr(CacheLayerMixin, "get_mask_sizes")
    refused("CacheLayerMixin.get_mask_sizes")


def test_a_registry_with_other_parameters_is_refused(monkeypatch):
    monkeypatch.setattr(AttentionInterface, "register", classmethod(lambda cls, name, function, scope: None))
    refused("AttentionInterface.register")


def test_a_forward_that_takes_cache_positions_is_refused(monkeypatch):
    def forward(
        self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache_position
    ):
        pass

    monkeypatch.setattr(LlamaModel, "forward", forward)
    refused("LlamaModel.forward")


def test_a_refusal_is_not_remembered_as_accepted(monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(CacheLayerMixin, "get_mask_sizes")
        for _ in range(2):
            refused("CacheLayerMixin.get_mask_sizes")
    compat.check()


# ---- crop
@pytest.mark.parametrize("text", ["5.10.1", "5.13.0", "5.14.0", "5.19.1", "5.20.0", "5.23.0"])
def test_a_negative_crop_removes_in_every_release(monkeypatch, text):
    fake_version(monkeypatch, text)
    assert compat.crop_target(-3, 10) == 7
    assert compat.crop_target(torch.tensor(-3), 10) == 7
    assert compat.crop_target(-30, 10) == 0


def test_a_positive_crop_is_the_final_length_until_5_19(monkeypatch):
    for text in ("5.10.1", "5.19.1"):
        fake_version(monkeypatch, text)
        assert compat.crop_target(torch.tensor(4), 10) == 4
        assert compat.crop_target(14, 10) == 10
    fake_version(monkeypatch, "5.20.0")
    with pytest.raises(ValueError, match=r"^uncomp.hf: crop takes the negative number of tokens to remove; got 4$"):
        compat.crop_target(4, 10)


def test_crop_zero_changes_nothing_from_5_14(monkeypatch):
    for text, length in (("5.13.0", 0), ("5.14.0", 10), ("5.23.0", 10)):
        fake_version(monkeypatch, text)
        assert compat.crop_target(0, 10) == length


@pytest.mark.parametrize("n", [-7, -2, 0, 3, 12])
def test_crop_is_what_the_installed_layer_does(n):
    layer = DynamicLayer()
    layer.update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2))
    if n > 0 and compat.version() >= (5, 20, 0):
        pytest.skip("positive crops are refused from 5.20")
    layer.crop(n)
    assert layer.get_seq_length() == compat.crop_target(n, 5)


def test_patch_refuses_a_release_outside_the_range(monkeypatch):
    """In one line, before anything of it is imported."""
    import uncomp

    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.0")
    compat.check.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"transformers 4\.57\.0 is not supported"):
            uncomp.patch  # noqa: B018
    finally:
        compat.check.cache_clear()
