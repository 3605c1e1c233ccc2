# SPDX-License-Identifier: Apache-2.0
"""The literal meaning of hidden-state pruning: the whole computation, with dropped tokens masked out of attention."""

from __future__ import annotations

import torch


def best(scores: torch.Tensor, count: int, newest: int, sinks: int) -> list[int]:
    """Places that stay, written with Python's own sort: ends, then the largest scores, ties to the lower place."""
    n = len(scores)
    if count >= n:
        return list(range(n))
    free = sorted(range(sinks, n - newest), key=lambda j: (-float(scores[j]), j))[: count - newest - sinks]
    return sorted([*range(sinks), *free, *range(n - newest, n)])


@torch.no_grad()
def slow(
    model, ids: torch.Tensor, reached: list[int], *, queries: int = 8, newest: int = 8, sinks: int = 0, new: int = 0
):
    """One prompt through all layers at full length, in the stock model with eager attention.

    Args:
        ids: [1, S + new]. reached: [L] tokens of the prompt that reach each layer. new: tokens behind the prompt, which
            see the survivors and each other.
    Returns:
        logits [1 + new, V] of the last prompt token and those behind, and the surviving positions of every layer.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    stack, tokens, weights = model.get_decoder(), ids.shape[1], {}
    watch = [
        layer.self_attn.register_forward_hook(lambda m, a, out, i=i: weights.__setitem__(i, out[1]))
        for i, layer in enumerate(stack.layers)
    ]
    try:
        position = torch.arange(tokens, device=ids.device).unsqueeze(0)
        states = stack.embed_tokens(ids)
        states = states * getattr(stack, "embedding_multiplier", 1.0)
        rope = stack.rotary_emb(states, position_ids=position)
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril()
        alive, survivors = list(range(tokens - new)), []
        for index, layer in enumerate(stack.layers):
            if len(alive) > reached[index]:
                looks = weights[index - 1][0, :, alive[-queries:]].double().sum((0, 1))
                places = best(looks[alive], reached[index], newest, sinks)
                alive = [alive[p] for p in places]
            survivors.append(list(alive))
            seen = torch.zeros(tokens, dtype=torch.bool, device=ids.device)
            seen[alive] = True
            seen[tokens - new :] = True
            allowed = causal & (seen | torch.eye(tokens, dtype=torch.bool, device=ids.device))
            mask = torch.where(allowed, 0.0, torch.finfo(states.dtype).min)[None, None].to(states.dtype)
            states = layer(states, attention_mask=mask, position_embeddings=rope, position_ids=position)
        states = stack.norm(states)[:, -1 - new :]
        return (model.lm_head(states) / getattr(model.config, "logits_scaling", 1.0))[0], survivors
    finally:
        for hook in watch:
            hook.remove()
        model.set_attn_implementation(before)


def stored(cache, layer: int, sequence: int = 0, row: int = 0) -> list[int]:
    """Positions that a row of a compressed layer holds."""
    held = cache.uncomp.layers[layer].ragged
    number = sequence * held.rows + row
    start, length = int(held.row_start[number]), int(held.row_len[number])
    return held.slot_position[start : start + length].tolist()
