# SPDX-License-Identifier: Apache-2.0
"""compress(model, config): projections of low rank take the place of a model's own, layer by layer, until removed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from uncomp import latent
from uncomp.transforms.lorc import factors
from uncomp.transforms.lorc.calibrated import Calibration, output_moments
from uncomp.transforms.lorc.config import LorcConfig
from uncomp.transforms.lorc.constants import key_constants
from uncomp.transforms.lorc.handle import LorcHandle
from uncomp.transforms.lorc.modules import FoldedOutput, PaddedProjection, Rebuilt, SplitProjections
from uncomp.transforms.lorc.places import FUSED, NAMES, Places, makes_ordinary_tensors
from uncomp.transforms.lorc.schedule import Ranks, rank_schedule

Progress = Callable[[str], None]


@makes_ordinary_tensors
def compress(
    model: torch.nn.Module,
    config: LorcConfig | None = None,
    *,
    calibration: Tensor | Calibration | None = None,
    keep_weights: bool = True,
    progress: Progress | None = None,
) -> LorcHandle:
    """Replaces the key and value projections of a model by factors of low rank.

    The model runs as before, with any attention and any cache. Under `uncomp.patch`, before or after it, the cache
    stores latents: rank_k + rank_v numbers a token and KV head instead of 2 D. Layers with sliding windows stay.

    Works on one layer at a time, in float64: beside the model one layer's projections and their factors are in memory.
    Cost: an SVD of D x D a head, and for the schedule "cumulative_condition" one of the whole matrix, twice a layer.

    Args:
        model: a causal language model of a supported family with q_proj, k_proj, v_proj and o_proj.
        config: default LorcConfig().
        calibration: for whiten="calib": [N, S] int64 tokens, N forwards of the decoder; or what `calibrate` made of
            them on the same weights.
        keep_weights: the replaced weights move to the host's memory, so that they can come back; else they are let go.
        progress: called with a line of text after every layer.
    Returns:
        a handle: `.remove()` gives the very same weights back.
    Raises:
        TypeError: no LorcConfig, or no model of transformers.
        ValueError: ranks that do not fit the model, a model that is compressed already, missing or bad calibration,
            weights that are not finite.
        NotImplementedError: a model or projection that cannot be split, with the reason. The model is untouched then.
    Source: docs/policies.md "LoRC".
    """
    config = LorcConfig() if config is None else config
    if not isinstance(config, LorcConfig):
        raise TypeError(f"uncomp.lorc.compress: config must be a LorcConfig; got {type(config).__name__}")
    places = Places(model)
    if getattr(places.stack, latent.MARK, None) is not None:
        raise ValueError("uncomp.lorc.compress: the model is compressed already; call .remove() on its handle first")
    places.check()
    places.check_finite()
    config.heads_together(places.shape.num_kv_heads)
    for index in places.layers:
        check_key_mode(places, index, config.key_mode)
    if (calibration is None) != (config.whiten is None):
        got = "none" if calibration is None else "tokens"
        raise ValueError(f'uncomp.lorc.compress: calibration must be given exactly with whiten="calib"; got {got}')
    if isinstance(calibration, Calibration):
        calibration.check(places, config.heads_together(places.shape.num_kv_heads))
    if config.exact_prefill and not keep_weights:
        raise ValueError(
            "uncomp.lorc.compress: keep_weights must be True with exact_prefill, which uses them; got False"
        )
    say = progress or (lambda text: None)
    heads, count = places.shape.num_kv_heads, len(places.layers)
    log_kappa = []
    if needs_kappa(config):
        for i, index in enumerate(places.layers):
            log_kappa.append(condition(places, index, config.kappa))
            say(f"condition numbers {i + 1}/{count}")
    ranks = rank_schedule(log_kappa or [0.0] * count, places.shape.head_dim, config)
    moments = None
    if isinstance(calibration, Calibration):
        moments = calibration.moments
    elif calibration is not None:
        moments = output_moments(places, calibration, say, config.heads_together(heads))
    handle = LorcHandle(places, config, ranks, log_kappa)
    try:
        for i, index in enumerate(places.layers):
            if ranks.key[i] is not None:
                one = None if moments is None else moments[i]
                handle.replace(places.attention(index), factored(places, index, ranks, i, config, one))
            say(f"layers {i + 1}/{count}")
    except BaseException:
        handle.remove()
        raise
    if not keep_weights:
        handle.let_go()
    return handle


def needs_kappa(config: LorcConfig) -> bool:
    """Whether ranks follow condition numbers."""
    free = config.rank_k is None or config.rank_v is None
    return config.threshold is not None or (free and config.schedule == "cumulative_condition")


def condition(places: Places, index: int, kind: str) -> float:
    """Log condition numbers of a layer's keys and of its values, added. kind: LorcConfig.kappa."""
    total, part = 0.0, "a head of " if kind == "per_head_mean" else ""
    for name in ("k_proj", "v_proj"):
        weight = places.projection(places.attention(index), name).weight
        total += factors.log_kappa(weight, places.shape.num_kv_heads, kind, f"{part}{name} of layer {index}")
    return total


def check_key_mode(places: Places, index: int, key_mode: str) -> None:
    """Refuses to absorb keys of a layer where that is not exact.

    Raises:
        NotImplementedError: the layer rotates or normalises keys, or its rotation changes with the length.
    """
    attention = places.attention(index)
    rotates = places.rotates(attention)
    why = "has rotary positions" if rotates else "normalises its keys" if _norm(attention) is not None else None
    if key_mode == "absorb" and why is not None:
        raise NotImplementedError(
            f'uncomp.lorc: layer {index} {why}, so keys cannot be absorbed; use key_mode="rebuild"'
        )


def _norm(attention: torch.nn.Module) -> torch.nn.Module | None:
    return getattr(attention, "k_norm", None)


def factored(
    places: Places, index: int, ranks: Ranks, i: int, config: LorcConfig, moments: tuple[Tensor, Tensor] | None
) -> dict[str, torch.nn.Module]:
    """The modules that take the place of a layer's projections.

    Args:
        index: of the layer in the model. i: among the compressible ones.
        moments: of its keys and values on calibration tokens, or None.
    """
    attention, heads = places.attention(index), places.shape.num_kv_heads
    together = config.heads_together(heads)
    bases, matrices = [], []
    for side, (name, rank) in enumerate((("k_proj", ranks.key[i]), ("v_proj", ranks.value[i]))):
        whole = factors.per_head(places.projection(attention, name).weight, heads // together)
        matrices.append(whole)
        rank = rank * together
        if moments is not None:
            bases.append(factors.whitened_basis(moments[side].to(whole.device), rank))
        elif config.svd == "randomised":
            bases.append(factors.random_basis(whole, rank, config.seed + 2 * i + side))
        else:
            bases.append(factors.exact_basis(whole, rank))
    values = values_of if together == 1 else shared_values_of
    made = values(places, index, matrices[1], bases[1])
    made |= keys_of(places, index, config, matrices[0], bases[0])
    set_codec(places, attention, made)
    return joined(places, attention, made)


def joined(places: Places, attention: torch.nn.Module, made: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """New modules of a layer by the names that the layer has: where its own are fused, so are they."""
    if not places.fused(attention):
        return made
    if "q_proj" not in made:
        query = places.projection(attention, "q_proj")
        for key, held in list(query.named_parameters()):  # the fused weight is let go
            setattr(query, key, torch.nn.Parameter(held.detach().clone(), requires_grad=False))
        made["q_proj"] = query
    rest = {name: module for name, module in made.items() if name == "o_proj"}
    return {FUSED: SplitProjections(*(made[name] for name in NAMES[:3])), **rest}


def keys_of(places: Places, index: int, config: LorcConfig, matrices: Tensor, basis: Tensor) -> dict:
    """Key projection, and with key_mode="absorb" query projection, of one layer."""
    attention, dim = places.attention(index), places.shape.head_dim
    key, query = (places.projection(attention, name) for name in ("k_proj", "q_proj"))
    like, bias = key.weight, key.bias
    narrow = factors.down(matrices, basis)
    if config.key_mode == "rebuild":
        return {"k_proj": Rebuilt(narrow, basis, bias, like)}
    # A query's product with the bias of the keys is the same for all keys, so the softmax does not see it.
    made = PaddedProjection(narrow, None, len(basis), dim, like)
    heads = places.shape.num_q_heads
    spread = basis.repeat_interleave(heads // len(basis), 0)
    bias = None if query.bias is None else (spread @ query.bias.double().view(heads, dim, 1)).flatten()
    weight = factors.down(factors.per_head(query.weight, heads), spread)
    return {"k_proj": made, "q_proj": PaddedProjection(weight, bias, heads, dim, query.weight)}


def set_codec(places: Places, attention: torch.nn.Module, made: dict[str, torch.nn.Module]) -> None:
    """Tells the new key projection of a layer how its latents become keys, and shared ones of values values."""
    keys, values, dim = made["k_proj"], made["v_proj"], places.shape.head_dim
    if isinstance(keys, PaddedProjection):
        keys.codec = latent.PaddedKeys(keys.rank, keys.heads, dim)
        return
    norm = _norm(attention)
    numbers = functools.partial(key_constants, *places.rotary(attention), norm, dim)
    shared = values if isinstance(values, Rebuilt) else None
    keys.codec = latent.RotaryKeys(keys, dim, norm, places.angles(attention), numbers, shared)


def values_of(places: Places, index: int, matrices: Tensor, basis: Tensor) -> dict:
    """Value and output projection of one layer."""
    attention, shape = places.attention(index), places.shape
    value, output = (places.projection(attention, name) for name in ("v_proj", "o_proj"))
    weight, bias = factors.folded_output(output.weight, output.bias, basis, value.bias)
    return {
        "v_proj": PaddedProjection(factors.down(matrices, basis), None, len(basis), shape.head_dim, value.weight),
        "o_proj": FoldedOutput(weight, bias, shape.num_q_heads, shape.head_dim, output.weight),
    }


def shared_values_of(places: Places, index: int, matrices: Tensor, basis: Tensor) -> dict:
    """Value projection of a layer whose heads share latents: folded into the output it would grow with their number."""
    value = places.projection(places.attention(index), "v_proj")
    return {"v_proj": Rebuilt(factors.down(matrices, basis), basis, value.bias, value.weight)}
