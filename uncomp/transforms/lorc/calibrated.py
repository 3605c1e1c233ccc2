# SPDX-License-Identifier: Apache-2.0
"""Second moments of what key and value projections give on calibration tokens: all that whitening needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uncomp import latent
from uncomp.transforms.lorc.config import LorcConfig
from uncomp.transforms.lorc.places import FUSED, Places, makes_ordinary_tensors


@dataclass(frozen=True)
class Calibration:
    """What a model's projections gave on calibration tokens; serves any number of ranks and schedules.

    Fields:
        moments: of every compressible layer second moments of keys and values, two of [Hkv / together, D together,
            D together] float64, sums over all tokens.
        together: KV heads that count as one.
    """

    moments: Sequence[tuple[Tensor, Tensor]]
    together: int = 1

    def check(self, places: Places, together: int) -> None:
        """Refuses moments of another model's shape, of other groups of heads, or that are no moments.

        Raises:
            TypeError, ValueError: says what was wanted and what came.
        """
        tensors = [total for pair in self.moments for total in pair]
        for total in tensors:
            if not isinstance(total, Tensor) or total.dtype != torch.float64 or total.device.type == "meta":
                got = f"{total.dtype} on {total.device}" if isinstance(total, Tensor) else type(total).__name__
                raise TypeError(f"uncomp.lorc.compress: calibration must have moments of float64 in memory; got {got}")
        wide = places.shape.head_dim * together
        want = (len(places.layers), (places.shape.num_kv_heads // together, wide, wide))
        shapes = {tuple(total.shape) for total in tensors}
        if (len(self.moments), shapes, {len(pair) for pair in self.moments}) != (want[0], {want[1]}, {2}):
            raise ValueError(
                f"uncomp.lorc.compress: calibration must be of {want[0]} layers of this model and of the config's "
                f"granularity, two moments {list(want[1])} a layer; got {len(self.moments)} layers of {sorted(shapes)}"
            )
        if not all(total.isfinite().all() for total in tensors):
            raise ValueError("uncomp.lorc.compress: calibration must have finite moments; got NaN or infinity")


@makes_ordinary_tensors
def calibrate(
    model: torch.nn.Module,
    tokens: Tensor,
    *,
    granularity: str = "head",
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Runs calibration tokens once, for several calls of `compress` on the same model.

    Args:
        model: a causal language model that is not compressed.
        tokens: [N, S] int64: N forwards of the decoder.
        granularity: of the configs that are to come, as in `LorcConfig`.
        progress: called with a line of text after every sequence.
    Returns:
        for the argument `calibration` of `compress`.
    Raises:
        TypeError, NotImplementedError: a model that cannot be compressed.
        ValueError: bad tokens, a model that is compressed already, states that are not finite.
    """
    places = Places(model)
    if getattr(places.stack, latent.MARK, None) is not None:
        raise ValueError("uncomp.lorc.calibrate: the model is compressed already; call .remove() on its handle first")
    places.check()
    together = LorcConfig(granularity=granularity).heads_together(places.shape.num_kv_heads)
    moments = output_moments(places, tokens, progress or (lambda text: None), together, "calibrate: tokens")
    return Calibration(moments, together)


def output_moments(
    places: Places,
    tokens: Tensor,
    say: Callable[[str], None],
    together: int = 1,
    argument: str = "compress: calibration",
) -> list[tuple[Tensor, Tensor]]:
    """Runs tokens through the decoder, a sequence at a time, without a cache.

    Args:
        tokens: [N, S] int64.
        say: called with a line of text after each sequence.
        together: heads that share latents count as one of so many times D channels.
        argument: what errors call the tokens.
    Returns:
        of every compressible layer the moments of keys and values before their bias: two of [Hkv, D, D] float64, sums
        over all tokens, on the layer's device. 16 Hkv D D bytes a layer.
    Raises:
        ValueError: tokens of another shape or dtype, or outside the vocabulary; states that are not finite.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        got = f"{list(tokens.shape)} {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"uncomp.lorc.{argument} must be [N, S] int64 tokens; got {got}")
    most = places.model.get_input_embeddings().num_embeddings
    found = tokens.min() if tokens.min() < 0 else tokens.max()
    if not 0 <= int(found) < most:
        raise ValueError(f"uncomp.lorc.{argument} must be from 0 to {most - 1}; got {int(found)}")
    heads, dim = places.shape.num_kv_heads // together, places.shape.head_dim * together
    moments, hooks = [], []
    training = [module for module in places.model.modules() if module.training]

    def add(module: torch.nn.Module, output: Tensor, part: tuple[int, int], total: Tensor) -> None:
        start, end = part
        wide = output.detach()[..., start:end].double()
        if module.bias is not None:
            wide = wide - module.bias[start:end].double()
        wide = wide.view(-1, heads, dim).transpose(0, 1)
        total += wide.mT @ wide

    try:
        for index in places.layers:
            attention, pair = places.attention(index), []
            for name in ("k_proj", "v_proj"):
                fused = places.fused(attention)
                module = getattr(attention, FUSED if fused else name)
                part = places.rows(name) if fused else (0, heads * dim)
                total = torch.zeros(heads, dim, dim, dtype=torch.float64, device=module.weight.device)

                def hook(module, args, output, part=part, total=total):
                    add(module, output, part, total)

                hooks.append(module.register_forward_hook(hook))
                pair.append(total)
            moments.append(tuple(pair))
        places.model.eval()  # no dropout
        device = places.model.get_input_embeddings().weight.device
        for i, row in enumerate(tokens):
            places.stack(input_ids=row.unsqueeze(0).to(device), use_cache=False)
            say(f"calibration {i + 1}/{len(tokens)}")
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    for i, pair in enumerate(moments):
        if not all(total.isfinite().all() for total in pair):
            raise ValueError(f"uncomp.lorc.{argument} gave NaN or infinity in layer {places.layers[i]}")
    return moments
