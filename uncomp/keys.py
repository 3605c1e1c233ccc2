# SPDX-License-Identifier: Apache-2.0
"""How attention comes to the keys of a compressed layer: they are stored, kernels make them, or torch does.

Takes: a RaggedLayer. Gives: what operators take, of the whole arena. Source: docs/policies.md "LoRC".
"""

from __future__ import annotations

from torch import Tensor

from uncomp.cache import RaggedLayer
from uncomp.latent import PaddedKeys, RotaryKeys
from uncomp.ops import KeyTransform
from uncomp.remade import Slots, arena_keys, arena_values, unfolded, unfolded_layout


def road(layer: RaggedLayer) -> str | None:
    """How steps come to keys: None, they are stored; "kernel"; or "torch: " and why kernels do not make them."""
    if layer.codec is None:
        return None
    if layer.codec.reason is not None:
        return f"torch: {layer.codec.reason}"
    if layer.free is None and layer.rule.kind in ("running", "last") and not isinstance(layer.codec, PaddedKeys):
        return "torch: the policy weighs every stored token at each step"
    return "kernel"


def transform(layer: RaggedLayer) -> KeyTransform | None:
    """How kernels make the keys of a layer; None where keys are stored, or torch makes them."""
    return layer.codec.transform(layer.offset) if isinstance(layer.codec, RotaryKeys) else None


def met(layer: RaggedLayer, states: Tensor) -> Tensor:
    """The channels of queries or new keys [..., D] that meet `attended` keys."""
    return states[..., : layer.codec.rank].contiguous() if isinstance(layer.codec, PaddedKeys) else states


def all_keys(layer: RaggedLayer) -> Tensor:
    """[C, D] keys at full width: the rows themselves, or what a codec makes of them (see arena_keys)."""
    if layer.codec is None:
        return layer.key_rows
    return arena_keys(layer.codec, layer.key_rows, layer.slot_position, _slots(layer), layer.offset)


def attended(layer: RaggedLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys [C', D], or [C, rank] (see `met`), values [C', Dv], row_start and row_len of rows as queries meet them.

    Rows that several heads share become one for each: C' counts every slot once a head.
    """
    if layer.codec is None or layer.codec.shared == 1:
        keys = layer.key_rows if isinstance(layer.codec, PaddedKeys) else all_keys(layer)
        return keys, layer.value_rows, layer.row_start, layer.row_len
    shared, slots = layer.codec.shared, _slots(layer)
    values = arena_values(layer.codec, layer.value_rows, slots)
    states = (unfolded(t, slots, shared) for t in (all_keys(layer), values))
    return *states, *unfolded_layout(layer.row_start, layer.row_len, shared)


def _slots(layer: RaggedLayer) -> Slots:
    layer.measure()
    return Slots(layer.row_start, layer.widest, layer.rows, layer.capacity)
