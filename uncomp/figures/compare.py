# SPDX-License-Identifier: Apache-2.0
"""Figures of several things beside each other: how alike profiles order the heads, and bars of measured values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from uncomp.calibration.profile import HeadProfile
from uncomp.calibration.summary import likeness
from uncomp.figures import base


def correlation(profiles: Mapping[str, HeadProfile], *, title: str = "") -> Any:
    """How alike several profiles of one model are: of other texts, prompt lengths or tensors.

    Left two tables of rank correlations, of the heads of a layer (mean over the layers) and of all heads of the model;
    right the first by layer, each profile against the first one.

    Args:
        profiles: two or more by label, of one model.
        title: over the figure.
    Returns:
        a matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing.
        ValueError: fewer than two profiles, or of another number of layers or heads.
    """
    several = base.named(profiles, HeadProfile, "profiles")
    if len(several) < 2:
        raise ValueError(f"uncomp.figures: profiles must be at least two to correlate; got {len(several)}")
    labels, entries = list(several), list(several.values())
    alike = [[likeness(one, other) for other in entries] for one in entries]
    side = min(6.0, max(2.4, 0.55 * len(labels)))
    margin = 0.07 * max(map(len, labels))
    figure = base.new_figure(2 * side + margin + 5.6, side + 0.4 * margin + 1.4)
    left, middle, right = figure.subplots(1, 3, width_ratios=[side, side, 3.8])
    _matrix(left, labels, [[a.layer_mean for a in row] for row in alike], "heads of a layer, mean over layers")
    image = _matrix(middle, labels, [[a.model for a in row] for row in alike], "all heads of the model")
    middle.set_yticklabels([])
    figure.colorbar(image, ax=middle, fraction=0.05, pad=0.03).ax.tick_params(labelsize=8)
    for index, label in enumerate(labels[1:], start=1):
        layers = alike[0][index].layers
        right.plot(range(len(layers)), layers, label=label, markersize=4, **base.style(index - 1))
    right.axhline(0, color="0.5", linewidth=0.8)
    right.set_ylim(min(-0.05, *(min(a.layers) - 0.05 for a in alike[0])), 1.05)
    base.ticks(right.xaxis, len(alike[0][0].layers), 3.2)
    right.set_xlabel("layer")
    right.set_title(f"heads of each layer, against {labels[0]}", fontsize=9)
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.suptitle(title or "Rank correlation of the heads' entropies", fontsize=10)
    return figure


def _matrix(axis: Any, labels: Sequence[str], table: Sequence[Sequence[float]], title: str) -> Any:
    image = axis.imshow(table, cmap=base.SIGNED, vmin=-1, vmax=1)
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            dark = abs(value) > 0.6
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axis.set_title(title, fontsize=9)
    return image


def bars(
    values: Mapping[str, float | Sequence[float]], ylabel: str, *, baseline: float | None = None, title: str = ""
) -> Any:
    """A bar for each entry; several measurements of one become their mean, points, and a line of two standard errors.

    Args:
        values: by label, one number or several.
        ylabel: what they are, with the unit.
        baseline: a line across, such as the value of the full cache.
        title: over the figure.
    Returns:
        a matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing.
        ValueError: no entry, or one without finite numbers.
    """
    lists = {label: base.numbers([v] if isinstance(v, (int, float)) else v, label) for label, v in values.items()}
    if not lists:
        raise ValueError("uncomp.figures: values must hold at least one entry; got an empty mapping")
    figure = base.new_figure(max(4.5, 1.6 + 0.95 * len(lists)), 3.6)
    axis = figure.subplots()
    for index, (_, found) in enumerate(lists.items()):
        colour = base.COLOURS[index % len(base.COLOURS)]
        error = 2 * stdev(found) / sqrt(len(found)) if len(found) > 1 else None
        axis.bar(index, fmean(found), color=colour, edgecolor="black", width=0.65, yerr=error, capsize=4)
        if len(found) > 1:
            axis.plot([index] * len(found), found, "o", color="white", markeredgecolor="black", markersize=4)
        top = max(fmean(found) + (error or 0), *found) if len(found) > 1 else found[0]
        axis.annotate(f"{fmean(found):.4g}", (index, top), xytext=(0, 3), textcoords="offset points", ha="center")
    if baseline is not None:
        axis.axhline(baseline, color="black", linestyle="--", linewidth=1, label=f"full cache: {baseline:.4g}")
        axis.legend(fontsize=8)
    axis.set_xticks(range(len(lists)), list(lists))
    axis.set_ylabel(ylabel)
    axis.margins(y=0.15)
    axis.set_title(title, fontsize=10)
    return figure


def lines(
    values: Mapping[str, Mapping[float, float]],
    xlabel: str,
    ylabel: str,
    *,
    baseline: float | None = None,
    title: str = "",
) -> Any:
    """A line for each entry over a logarithmic axis, such as loss over the budget.

    Args:
        values: by label, y by x > 0.
        xlabel, ylabel: what they are, with the unit.
        baseline: a line across, such as the value of the full cache.
        title: over the figure.
    Returns:
        a matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing.
        ValueError: no entry, or one without finite numbers.
    """
    if not values:
        raise ValueError("uncomp.figures: values must hold at least one entry; got an empty mapping")
    figure = base.new_figure(6.0, 3.8)
    axis = figure.subplots()
    for index, (label, points) in enumerate(values.items()):
        where = sorted(points)
        axis.plot(where, base.numbers([points[x] for x in where], label), label=label, **base.style(index))
    if baseline is not None:
        axis.axhline(baseline, color="black", linestyle="--", linewidth=1, label=f"full cache: {baseline:.4g}")
    shown = sorted({x for points in values.values() for x in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(shown, [f"{x:g}" for x in shown])
    axis.minorticks_off()
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=10)
    return figure
