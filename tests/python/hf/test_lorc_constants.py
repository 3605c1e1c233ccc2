# SPDX-License-Identifier: Apache-2.0
"""The numbers by which kernels make keys again, for every family and kind of rotation, and why there are none."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from lorc_support import with_biases

from uncomp import lorc
from uncomp.latent import rotate
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
    "rope_theta": 500000.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
KINDS = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "linear": ("mistral", {"rope_parameters": LINEAR}),
    "biases": ("qwen2", {}),
    "norm": ("qwen3", {}),
    "partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "norm_of_one_plus": ("gemma3_text", {}),
}


def by_formula(codec, rows, position, head):
    """Keys of [R, n, rank] from the numbers alone."""
    found = codec.constants()
    key = torch.bmm(rows, codec.projection.basis[head])
    if codec.projection.bias is not None:
        key = key + codec.projection.bias.view(codec.heads, 1, -1)[head]
    if found.norm is not None:
        key = key * torch.rsqrt(key.square().mean(-1, keepdim=True) + found.eps) * found.norm
    angle = position.unsqueeze(-1) * found.frequency
    cos, sin = (torch.cat((t, t), -1) * found.scale for t in (angle.cos(), angle.sin()))
    return rotate(key, cos, sin)


def key_codec(attention):
    return getattr(attention, "qkv_proj", attention).k_proj.codec


def random_norms(model):
    """Norms whose weights are no constant."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "k_norm" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_make_the_keys_that_the_modules_make(kind):
    family, fields = KINDS[kind]
    model = random_norms(with_biases(tiny_model(family, **fields)))
    handle = lorc.compress(model, lorc.LorcConfig(rho=0.5))
    codec = key_codec(model.model.layers[handle.layers[0]].self_attn)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 9, codec.rank, generator=generator)
    position = torch.randint(0, 3000, (6, 9), generator=generator)
    head = torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        want = codec.keys(rows, position, head)
        assert (by_formula(codec, rows, position, head) - want).abs().max() < 2e-5 * want.abs().max()
    if kind == "yarn":
        assert codec.constants().scale != 1.0
    if kind == "partial":
        assert codec.constants().frequency.shape == (16,)
    with pytest.raises(AssertionError):  # a key at another place is another key
        assert (by_formula(codec, rows, position + 1, head) - want).abs().max() < 2e-5 * want.abs().max()


def test_numbers_follow_the_weights_and_their_dtype():
    model = random_norms(tiny_model("qwen3", num_hidden_layers=1))
    lorc.compress(model)
    model = model.bfloat16()
    attention = model.model.layers[0].self_attn
    found = key_codec(attention).constants()
    assert found.norm.dtype == found.frequency.dtype == torch.float32
    assert torch.allclose(found.norm, attention.k_norm.weight.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.frequency, model.model.rotary_emb.inv_freq.float())


# ---- what no kernel makes
class Cut(torch.nn.Module):
    """No RMS norm, though it looks like one."""

    variance_epsilon = 1e-6

    def forward(self, states):
        return states.clamp(-1, 1)


class Other(torch.nn.Module):
    """Frequencies that grow with the position."""

    def __init__(self, real):
        super().__init__()
        self.inv_freq, self.attention_scaling, self.real = real.inv_freq, real.attention_scaling, real

    def forward(self, like, position):
        return self.real(like, position * position)


@pytest.mark.parametrize("change", ["norm", "no_eps", "rotary", "nothing"])
def test_other_modules_are_told_apart(change):
    model = tiny_model("qwen3", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    if change == "norm":
        attention.k_norm = Cut()
    elif change == "no_eps":
        attention.k_norm = torch.nn.Identity()
    elif change == "rotary":
        model.model.rotary_emb = Other(model.model.rotary_emb)
    else:
        del model.model.rotary_emb.inv_freq
    told = {
        "norm": "Cut of keys is no RMS norm",
        "no_eps": "Identity of keys is no RMS norm",
        "rotary": "Other is no rotation by constant frequencies",
        "nothing": "Qwen3RotaryEmbedding keeps no frequencies (inv_freq)",
    }
    if change == "nothing":  # the model itself does not run
        from uncomp.transforms.lorc.constants import key_constants

        assert key_constants(model.model.rotary_emb, None, None, 64) == told[change]
        return
    lorc.compress(model)
    assert key_codec(attention).constants() == told[change]
