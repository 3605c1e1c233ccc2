# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation: needles found by length and depth, scores of several tasks beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uncomp.figures import base


def needle_map(scores: Mapping[str, Mapping[tuple[int, int], float]], *, title: str = "") -> Any:
    """A map for each entry: prompt length across, depth of the needle down.

    Args:
        scores: by label, a score from 0 to 1 by (length in tokens, depth in per cent).
        title: over the figure.
    Returns:
        a matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing.
        ValueError: no entry, or an empty one.
    """
    if not scores or not all(scores.values()):
        raise ValueError("uncomp.figures: scores must hold at least one length and depth for each entry")
    lengths = sorted({length for table in scores.values() for length, _ in table})
    depths = sorted({depth for table in scores.values() for _, depth in table})
    wide, high = base.cells(len(lengths), len(depths))
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    figure = base.new_figure(columns * (wide + 0.9) + 0.6, rows * (high + 1.0) + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    image = None
    for axis, (label, table) in zip(axes, scores.items(), strict=False):
        grid = [[table.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = axis.imshow(grid, cmap=base.SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        axis.set_title(f"{label}: {sum(table.values()) / len(table):.2f}", fontsize=9)
        axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=60, fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{d} %" for d in depths], fontsize=7)
        axis.set_xlabel("prompt tokens", fontsize=8)
    for axis in axes[len(scores) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("depth", fontsize=8)
    figure.colorbar(image, ax=list(axes), fraction=0.03, pad=0.02).ax.tick_params(labelsize=8)
    figure.suptitle(title or "Needles found", fontsize=10)
    return figure


def grouped_bars(values: Mapping[str, Mapping[str, float]], ylabel: str, *, title: str = "") -> Any:
    """Bars of several series beside each other in every group.

    Args:
        values: by series, numbers by group; a group that a series lacks stays empty.
        ylabel: what they are, with the unit.
        title: over the figure.
    Returns:
        a matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing.
        ValueError: no entry, or one without finite numbers.
    """
    if not values:
        raise ValueError("uncomp.figures: values must hold at least one entry; got an empty mapping")
    groups = list(dict.fromkeys(group for table in values.values() for group in table))
    figure = base.new_figure(max(5.0, 1.6 + len(groups) * (0.35 + 0.13 * len(values))), 3.8)
    axis = figure.subplots()
    width = 0.8 / len(values)
    for index, (label, table) in enumerate(values.items()):
        base.numbers(list(table.values()), label)
        where = [i for i, group in enumerate(groups) if group in table]
        shift = (index - (len(values) - 1) / 2) * width
        colour = base.COLOURS[index % len(base.COLOURS)]
        heights = [table[groups[i]] for i in where]
        axis.bar([i + shift for i in where], heights, width=width, color=colour, edgecolor="black", label=label)
    axis.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize=8)
    axis.set_ylabel(ylabel)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7, ncols=2)
    figure.suptitle(title, fontsize=10)
    return figure
