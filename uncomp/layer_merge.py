# SPDX-License-Identifier: Apache-2.0
"""Merges the weights of the retrieval layer with those of the last layer: an experiment of the paper's second version.

Takes: a model and the layer curve of its profile. Gives: a handle that takes the merge back.
Formula: every parameter becomes (1 - alpha) * own + alpha * other. docs/method.md "Retrieval-layer merge".
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from uncomp.calibration.profile import HeadProfile
from uncomp.models import family_of
from uncomp.stages import retrieval_layer

WRITES = ("both", "last", "retrieval")


class MergeHandle:
    """Holds the weights that a merge replaced; usable in a `with`.

    Attributes:
        layer: the retrieval layer that was found.
    """

    def __init__(self, layer: int, saved: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
        self.layer, self._saved = layer, saved

    def remove(self) -> None:
        """Gives the model its weights back, to the bit; a second call does nothing."""
        saved, self._saved = self._saved, []
        with torch.no_grad():
            for parameter, before in saved:
                parameter.copy_(before)

    def __enter__(self) -> MergeHandle:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Removes the merge."""
        self.remove()


def merge_retrieval_layer(
    model: Any,
    profile: HeadProfile | str | os.PathLike[str] | Sequence[float],
    *,
    alpha: float = 0.5,
    write: str = "both",
) -> MergeHandle:
    """Mixes the weights of the layer where the curve rises most with those of the last layer, in place. Experimental.

    Args:
        model: a causal language model of a supported family, with weights of floating dtype.
        profile: a HeadProfile, its file, or a curve of one number a layer.
        alpha: share of the other layer's weights, in [0, 1].
        write: which layers receive the mixture: "both", "last" or "retrieval".
    Returns:
        a handle whose remove() restores the weights.
    Raises:
        ValueError: alpha or write outside these; a curve of another number of layers or fewer than 3; layers whose
            parameters differ in shape or are not floating.
        NotImplementedError: the model's family is not known.
    Source: docs/method.md "Retrieval-layer merge".
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1 or math.isnan(alpha):
        raise ValueError(f"uncomp.merge_retrieval_layer: alpha must be a number in [0, 1]; got {alpha!r}")
    if write not in WRITES:
        raise ValueError(f"uncomp.merge_retrieval_layer: write must be one of {', '.join(WRITES)}; got {write!r}")
    if isinstance(profile, (str, os.PathLike)):
        profile = HeadProfile.load(profile)
    curve = profile.curve if isinstance(profile, HeadProfile) else list(profile)
    layers = family_of(model.config).text_stack(model).layers
    if len(curve) != len(layers):
        raise ValueError(
            f"uncomp.merge_retrieval_layer: profile must have {len(layers)} layers, as the model; got {len(curve)}"
        )
    found = retrieval_layer(curve)
    own, last = dict(layers[found].named_parameters()), dict(layers[-1].named_parameters())
    sizes = [{name: p.shape for name, p in layer.items()} for layer in (own, last)]
    if sizes[0] != sizes[1] or not all(p.is_floating_point() for layer in (own, last) for p in layer.values()):
        raise ValueError(
            f"uncomp.merge_retrieval_layer: layers {found} and {len(layers) - 1} must have floating parameters of the "
            "same names and shapes; got others"
        )
    saved, mixed = [], []
    with torch.no_grad():
        for name, one in own.items():
            other = last[name]
            for target, source, place in ((one, other, "retrieval"), (other, one, "last")):
                if write in ("both", place):
                    saved.append((target, target.detach().clone()))
                    wide = (1 - alpha) * target.float() + alpha * source.to(target.device).float()
                    mixed.append((target, wide.to(target.dtype)))
        for target, value in mixed:  # only now: both mixtures are made of the weights as they were
            target.copy_(value)
    return MergeHandle(found, saved)
