# SPDX-License-Identifier: Apache-2.0
"""Takes the name of a published budget, "g8.1" or "linear(640, 74, 8)".

Gives tokens per group, lowest entropy first: limits as they are, or weights when a budget is given beside them.
Formula: a table, and the rules behind the names that carry numbers.
docs/method.md "Presets".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import floor as whole

from uncomp.budget import integer_weights
from uncomp.grouping import group_sizes


@dataclass(frozen=True)
class Shape:
    """Tokens per group of a preset.

    Fields:
        name: as it was asked for.
        values: tokens of a row of each group, lowest entropy first; None means all n tokens of the prompt.
        inner: values of the layers that lie neither in the first nor in the last quarter, where they differ.
    """

    name: str
    values: tuple[int | None, ...]
    inner: tuple[int | None, ...] | None = None

    def at_layer(self, layer: int, num_layers: int) -> tuple[int | None, ...]:
        """Values of one layer; a quarter is num_layers // 4 layers."""
        quarter = num_layers // 4
        outer = layer < quarter or layer >= num_layers - quarter
        return self.values if outer or self.inner is None else self.inner

    def tokens(self, layer: int, num_layers: int, n: int | None = None) -> list[int]:
        """Tokens of a row of each group.

        Args:
            layer, num_layers: which layer; matters where `inner` is set.
            n: prompt tokens; needed where a group keeps all of them.
        Returns:
            As many positive integers as the layer has groups.
        Raises:
            ValueError: n is needed and was not given.
        """
        values = self.at_layer(layer, num_layers)
        if n is None and None in values:
            raise ValueError(
                f"uncomp.presets: {self.name} keeps all prompt tokens of a group, so n is needed; got None"
            )
        return [max(n, 1) if value is None else value for value in values]

    def weights(self, layer: int, num_layers: int, n: int | None = None) -> list[int]:
        """Weights of the groups in lowest integers. Args and Raises: as tokens."""
        return integer_weights(self.tokens(layer, num_layers, n))

    def total(self, rows: int, floor: int, layer: int, num_layers: int, n: int | None = None) -> int:
        """Tokens that the rows of a sequence share in one layer when no budget is given.

        Args:
            rows: rows of the plan, cut as in group_sizes.
            floor: window and sinks, tokens.
            layer, num_layers, n: as tokens.
        Returns:
            Sum of size * value. Where it depends on n, a short prompt is raised to rows * floor.
        Raises:
            ValueError: more groups than rows; or the preset holds fewer than rows * floor tokens.
        """
        values = self.tokens(layer, num_layers, n)
        sizes = group_sizes(rows, len(values))
        total = sum(size * value for size, value in zip(sizes, values, strict=True))
        if None in self.at_layer(layer, num_layers):
            return max(total, rows * floor)
        if total < rows * floor:
            raise ValueError(
                f"uncomp.presets: {self.name} must hold rows * (window + sinks) = {rows * floor} tokens; got {total}"
            )
        return total


_VALUES: dict[str, tuple[int | None, ...]] = {
    "g2": (256, 512),
    "g2-64": (43, 86),
    "g2-wide": (240, 528),
    "g2-wider": (128, 640),
    "g3": (32, 384, 736),
    "g3.1": (192, 384, 576),
    "g3.2": (128, 384, 640),
    "g3.3": (64, 384, 704),
    "g4": (128, 298, 470, 640),
    "g5": (256, 320, 384, 448, 512),
    "g5.1": (128, 256, 384, 512, 640),
    "g8": (20, 128, 256, 384, 384, 512, 640, 748),
    "g8.0": (32, 132, 232, 334, 434, 534, 635, 736),
    "g8.1": (129, 202, 275, 348, 421, 494, 567, 640),
    "g8.2": (64, 158, 249, 340, 431, 522, 613, 704),
    "g8.3": (32, 132, 232, 334, 434, 534, 635, 736),
    "g8.4": (320, 340, 358, 376, 394, 412, 430, 448),
    "g3-64": (16, 64, 112),
    "g3-64.1": (12, 64, 116),
    "g4-64": (16, 48, 80, 112),
    "g4-64.1": (12, 47, 81, 116),
    "g5-64": (16, 40, 64, 88, 112),
    "g5-64.1": (12, 38, 64, 90, 116),
    "g8-64": (16, 30, 44, 64, 64, 84, 98, 112),
    "g8-64.1": (12, 27, 42, 56, 72, 86, 101, 116),
    "g32": tuple(range(144, 641, 16)),
    "g32-stream": (*[20] * 31, None),
}

PRESETS: dict[str, Shape] = {name: Shape(name, values) for name, values in _VALUES.items()}
PRESETS["g32-mixed"] = Shape("g32-mixed", (128, 640), inner=(384,))


def _linear(top: int, step: int, num_groups: int) -> tuple[int, ...]:
    return tuple(top - step * (num_groups - 1 - group) for group in range(num_groups))


def _g2_ref(most: int) -> tuple[int, ...]:
    high = 3 * most // 2
    return (16, 112) if most == 86 else (high // 2, high)  # the reference writes this one size out


def _g4_ref(most: int) -> tuple[int, ...]:
    step = (most - most // 2) // 3
    return tuple(most - step * below for below in (3, 2, 1, 0))


def _extreme_ref(low: int, most: int = 512) -> tuple[int, ...]:
    return (low, most)


# Name -> what stands in the brackets, how few numbers will do, values from the numbers.
_RULES: dict[str, tuple[str, int, Callable[..., tuple[int, ...]]]] = {
    "linear": ("top, step, G", 3, _linear),
    "g2-ref": ("M", 1, _g2_ref),
    "g4-ref": ("M", 1, _g4_ref),
    "extreme-ref": ("N, M=512", 1, _extreme_ref),
}


def names() -> list[str]:
    """What preset() understands: names, and rules with what stands in their brackets."""
    return [*PRESETS, *(f"{name}({arguments})" for name, (arguments, _, _) in _RULES.items())]


def preset(name: str, rows: int | None = None) -> Shape:
    """Shape of a name: one of PRESETS, or linear(top, step, G), g2-ref(M), g4-ref(M), extreme-ref(N, M).

    Args:
        name: "g8.1", "linear(640, 74, 8)", ...; numbers are tokens, G groups.
        rows: rows that are to be cut into the groups; checked when given.
    Returns:
        The shape.
    Raises:
        ValueError: an unknown name (the text lists what exists), wrong numbers, values that are not positive or fall
            with the entropy, or more groups than rows.
    Source: docs/method.md "Presets".
    """
    found = re.fullmatch(r"\s*([\w.-]+)\s*\(([\s\d,]*)\)\s*", name)
    if name in PRESETS:
        shape = PRESETS[name]
    elif found and found[1] in _RULES:
        arguments, least, rule = _RULES[found[1]]
        numbers = [part.strip() for part in found[2].split(",")]
        if not all(part.isdecimal() for part in numbers) or not least <= len(numbers) <= arguments.count(",") + 1:
            raise ValueError(f"uncomp.presets: {found[1]} takes ({arguments}) as whole numbers; got {name!r}")
        values = rule(*map(int, numbers))
        if not values or values[0] < 1 or list(values) != sorted(values):
            raise ValueError(f"uncomp.presets: values must be positive and must not fall; {name!r} gives {values}")
        shape = Shape(name, values)
    else:
        raise ValueError(f"uncomp.presets: shape must be one of {', '.join(names())}; got {name!r}")
    most = max(len(shape.values), len(shape.inner or ()))
    if rows is not None and most > rows:
        raise ValueError(f"uncomp.presets: {name} has {most} groups and needs as many rows; got {rows}")
    return shape


def pyramid_ref(num_groups: int, mean: int) -> list[int]:
    """Tokens per group that the paper's reference gives a layer under its pyramid; for comparison with it only.

    Args:
        num_groups: 2, 3, 4, 8 or 32.
        mean: mean tokens m of the layer; everything hangs on c = 1.5 m, rounded down.
    Returns:
        G tokens, lowest entropy first; they need not sum to G * mean.
    Raises:
        ValueError: another number of groups.
    Source: docs/method.md "Presets".
    """
    c = 3 * mean // 2
    if num_groups == 2:
        return [c // 6, c - c // 6]
    if num_groups == 3:
        return [mean // 2, 3 * mean // 4, mean]
    if num_groups == 4:
        u = c // 18
        return [9, 18, c - 18, c - 9] if 3 * u < 8 else [3 * u, 7 * u, c - 7 * u, c - 3 * u]
    if num_groups == 8:
        u = c // 42
        low = [9] * 4 if 7 * u < 8 else [7 * u, 11 * u, 15 * u, 19 * u]
        return low + [c - tokens for tokens in reversed(low)]
    if num_groups == 32:
        u = Fraction(c, 186)
        return [whole(c - whole(31 * u) - 4 * u * (31 - i)) for i in range(32)]
    raise ValueError(f"uncomp.presets: the reference has a pyramid for 2, 3, 4, 8 or 32 groups; got {num_groups}")
