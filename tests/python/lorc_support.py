# SPDX-License-Identifier: Apache-2.0
"""Models for tests of LoRC: a compressed one, and one of ordinary width that computes the same."""

from __future__ import annotations

import copy

import torch

from uncomp import lorc
from uncomp.testing import tiny_model
from uncomp.transforms.lorc.places import Places


def with_biases(model):
    """Biases that are not zero, as trained ones are."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def compressed_and_dense(family: str = "llama", config: lorc.LorcConfig | None = None, **overrides):
    """A compressed model, its handle, and a model of full-width projections A B: made of the original weights and the
    keys' and values' bases alone, so that nothing folded or padded is in it."""
    original = with_biases(tiny_model(family, **overrides))
    model = copy.deepcopy(original)
    handle = lorc.compress(model, config or lorc.LorcConfig(rho=0.5))
    theirs, ours = Places(original), Places(model)
    with torch.no_grad():
        for index in ours.layers:
            for name in ("k_proj", "v_proj"):
                attention = ours.attention(index)
                made = getattr(ours.holder(attention, name), name)
                weight = theirs.projection(theirs.attention(index), name).weight
                wide = weight.double().view(made.heads, -1, weight.shape[1])  # Wᵀ
                narrow = made.down.double().view(made.heads, made.rank, -1)  # Aᵀ = B Wᵀ, so B = Aᵀ pinv(Wᵀ)
                basis = narrow @ torch.linalg.pinv(wide)
                weight.copy_((basis.mT @ narrow).flatten(0, 1))
    return model, handle, original


def by_torch(model):
    """The model, whose keys no kernel can make from now on."""
    for layer in model.model.layers:
        codec = getattr(layer.self_attn, "qkv_proj", layer.self_attn).k_proj.codec
        codec.constants = lambda: "a test says so"
    return model


def prompt(batch: int = 2, columns: int = 70, seed: int = 1, pad: int = 13):
    """Tokens [batch, columns], and a mask that pads the last sequence on the left."""
    ids = torch.randint(3, 199, (batch, columns), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, :pad] = 0
    return ids, mask


def generated(model, ids, mask, tokens: int = 6, **options):
    """What generate gives, greedily; `.logits` is a tuple of [batch, vocabulary]."""
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def difference(one, other) -> float:
    """Largest difference of logits."""
    return float((torch.stack(one.logits) - torch.stack(other.logits)).abs().max())
