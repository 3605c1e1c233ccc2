# SPDX-License-Identifier: Apache-2.0
"""The attention and the mask function that transformers calls under the name "uncomp"; importing registers them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from uncomp.hf.cache import UncompCache
from uncomp.hf.shared import NAME, take_pending
from uncomp.latent import Latents, PaddedKeys, is_exact, take

__all__ = ["NAME", "UncompCache", "attention_forward", "attention_mask"]

_REFUSED = {
    "softcap": "logit soft caps",
    "s_aux": "attention sinks in the softmax",
    "position_bias": "position biases",
}


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of a layer: through its compressed cache if it has one, else transformers' own sdpa.

    Args:
        query: [B, Hq, T, D], rotated. key, value: [B, Hkv, T, D], as the cache's `update` returned them.
        attention_mask: [B, columns] bool or None (see `attention_mask`), or a 4-D mask of a layer left alone.
    Returns:
        [B, T, Hq, Dv] contiguous, and None. Where values are padded latents (uncomp.lorc), Dv may be their rank.
    """
    layer = take_pending(key)
    if layer is None:
        return _dense(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    shared = layer.shared
    try:
        _check(module, attention_mask, dropout, kwargs)
        _check_heads(shared.shape, query, key)
        scale = module.scaling if scaling is None else scaling
        if not shared.hooked and layer.index == 0:
            if shared.schedule is not None and shared.clock.seen is None:
                raise NotImplementedError(
                    "uncomp: a cache whose configuration prunes the prompt needs a model that was patched with it: "
                    "uncomp.patch(model, config)"
                )
            shared.clock.begin(query.shape[0], query.shape[2], attention_mask, kwargs.get("position_ids"))
        # Under autocast rotary gives float32 queries and keys; they meet at the dtype of the values, as in sdpa.
        states = (query.to(value.dtype), key.to(value.dtype), value, float(scale))
        out = layer.attend(*states, _latents(module, states[1], value, shared))
    except BaseException:
        shared.clock.fail()
        raise
    if not shared.hooked and layer.index == len(shared.layers) - 1:
        shared.clock.commit()
    return out.transpose(1, 2).contiguous(), None


def _latents(module, key: Tensor, value: Tensor, shared) -> Latents | None:
    """What is stored in place of keys and values; None: they are."""
    module = getattr(module, "qkv_proj", module)
    projection = getattr(module, "k_proj", None)
    codec = getattr(projection, "codec", None)
    if codec is None:
        return None
    if shared.compressor.policy.delete_heads:
        raise NotImplementedError(
            "uncomp: delete_heads copies outputs of heads, which a model of low rank (uncomp.lorc) has in different "
            "bases; leave one of the two out"
        )
    if shared.clock.chunk.lengths is not None:
        codec.prepare(key.dtype)
    rows, values = key[..., : codec.rank], value[..., : module.v_proj.rank]
    if not isinstance(codec, PaddedKeys) or is_exact():
        rows = take(projection).unflatten(-1, (codec.heads, codec.rank)).transpose(1, 2).to(key.dtype)
    if is_exact() or codec.shared > 1:
        values = take(module.v_proj).unflatten(-1, (codec.heads, -1)).transpose(1, 2).to(value.dtype)
    return Latents(rows, values, codec)


def _check(module, mask, dropout, kwargs) -> None:
    where = f"layer {getattr(module, 'layer_idx', '?')} of {type(module).__name__}"
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"uncomp: {where} uses {what} ({name}), which no compressed attention has")
    if mask is not None and mask.dim() != 2:
        raise NotImplementedError(
            f"uncomp: {where} got a {mask.dim()}-D attention mask; only [batch, columns] is taken"
        )
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"uncomp: {where} is not causal")
    if dropout:
        raise NotImplementedError(f"uncomp: {where} uses attention dropout; call model.eval()")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("uncomp: output_attentions is not available, because weights are never materialised")
    if module.training:
        raise NotImplementedError("uncomp: a compressed cache is for inference; call model.eval()")


def _check_heads(shape, query: Tensor, key: Tensor) -> None:
    wanted, got = (shape.num_q_heads, shape.num_kv_heads), (query.shape[1], key.shape[1])
    if wanted != got or key.shape[3] != shape.head_dim:
        sizes = f"{got[0]} and {got[1]} of {key.shape[3]}"
        raise NotImplementedError(
            f"uncomp: the cache was made for {wanted[0]} query and {wanted[1]} key heads of {shape.head_dim} channels; "
            f"got {sizes} (tensor parallelism is not supported)"
        )


def _dense(module, query, key, value, mask, dropout, scaling, kwargs) -> tuple[Tensor, None]:
    if mask is not None and mask.dim() == 2:
        new, columns = query.shape[2], key.shape[2]
        place = torch.arange(columns, device=query.device)
        causal = place <= place[columns - new :].unsqueeze(1)
        mask = mask[:, None, None, :columns] & causal
    out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    return out, None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> Tensor | None:
    """The mask of a forward: [B, columns] bool, or None; sliding-window layers get the stock one.

    Raises:
        NotImplementedError: a pattern that is not causal attention over real tokens.
    """
    stock = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": allow_is_causal_skip,
        "use_vmap": use_vmap,
        **kwargs,
    }
    if local_size is not None:
        return sdpa_mask(local_size=local_size, **stock)
    if use_vmap or not allow_is_causal_skip:
        raise NotImplementedError("uncomp: the model asks for an attention pattern that is not plain causal attention")
    return attention_mask


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
