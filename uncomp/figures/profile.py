# SPDX-License-Identifier: Apache-2.0
"""Figures of a HeadProfile: entropy by layer and head, spectrum and elbow, layer curve and stages, groups and budgets.

Layers run from left to right in all of them, so that they can be laid under each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from uncomp.calibration.profile import HeadProfile
from uncomp.calibration.summary import HeadPlan, head_plan
from uncomp.entropy import elbow
from uncomp.figures import base


def _table(axis: Any, table: Sequence[Sequence[float]], size: tuple[float, float], **options: Any) -> Any:
    """Draws [layers][heads] with layers from left to right, head 0 on top."""
    columns = [list(column) for column in zip(*table, strict=True)]
    image = axis.imshow(columns, aspect="auto", interpolation="nearest", **options)
    base.ticks(axis.xaxis, len(table), size[0])
    base.ticks(axis.yaxis, len(columns), size[1])
    axis.set_xlabel("layer")
    return image


def entropy_map(profile: HeadProfile, *, full: bool = False, title: str = "") -> Any:
    """Heat map of the mean entropy of every head, [Hq] over [L]; lines part the query heads of each KV head.

    A profile of kind "variance" shows that.

    Args:
        profile: the HeadProfile.
        full: of all D eigenvalues instead of the k that the method counts.
        title: over the figure; default: the model and how it was measured.
    Returns:
        a matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing.
    """
    facts, run = profile.model, profile.run
    table = profile.entropy_full if full else profile.entropy
    variance = run.kind == "variance" and not full
    heads = len(table[0])
    size = base.cells(len(table), heads)
    figure = base.new_figure(size[0] + 1.7, size[1] + 1.0)
    axis = figure.subplots()
    image = _table(axis, table, size, cmap=base.SEQUENTIAL)
    if 1 < facts.Hkv < heads:
        for edge in range(heads // facts.Hkv, heads, heads // facts.Hkv):
            axis.axhline(edge - 0.5, color="white", linewidth=0.8)
    axis.set_ylabel("query head" if heads == facts.Hq else "head")
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02, aspect=base.bar_aspect(size[1]))
    bar.set_label("squared units of the states" if variance else "share of ln D", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    dim = len(profile.spectrum)
    kept = dim if full else run.k
    what = "Variance" if variance else "Entropy"
    of = "" if variance else f", {kept} of {dim} eigenvalues"
    title = title or f"{what} of the {run.tensor} states, {facts.type}{of}"
    axis.set_title(title, fontsize=10)
    return figure


def spectrum_decay(profiles: HeadProfile | Mapping[str, HeadProfile], *, title: str = "") -> Any:
    """Mean spectrum: the eigenvalues with chord and elbow, and the share that the first k of them hold.

    Args:
        profiles: a HeadProfile, or several by label; the chord is drawn for a single one.
        title: over the figure.
    Returns:
        a matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing. ValueError: an empty mapping.
    Source: docs/method.md "Entropy".
    """
    several = base.named(profiles, HeadProfile, "profiles")
    figure = base.new_figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    for index, (label, profile) in enumerate(several.items()):
        _spectrum(left, right, profile, label, base.style(index), alone=len(several) == 1)
    for axis, name in ((left, "eigenvalue, share of the trace"), (right, "share in the first eigenvalues")):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("eigenvalue number, largest first")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    right.set_ylim(0, 1.02)
    left.set_ylim(bottom=0)
    figure.suptitle(title or "Mean spectrum over layers and heads", fontsize=10)
    return figure


def _spectrum(left: Any, right: Any, profile: HeadProfile, label: str, look: dict[str, Any], *, alone: bool) -> None:
    values = profile.spectrum
    dim, at = len(values), elbow(values)
    where = range(1, dim + 1)
    sums = list(accumulate(values))
    look = {**look, "markersize": 7, "markeredgecolor": "black"}
    name = f"{label}, " if label else ""
    left.plot(where, values, markevery=[at - 1], label=f"{name}elbow {at}", **look)
    right.plot(where, sums, markevery=[at - 1], label=f"{name}elbow {at}: {100 * sums[at - 1]:.0f} %", **look)
    if not alone:
        return
    if dim > 1:
        chord = [values[0] + (values[-1] - values[0]) * (i - 1) / (dim - 1) for i in where]
        left.plot(where, chord, color="0.5", linestyle="--", linewidth=1, label="chord")
        left.plot([at, at], [values[at - 1], chord[at - 1]], color="0.5", linestyle=":", label="furthest below it")
    k = profile.run.k
    text = f"measured with k = {k}: {100 * sums[k - 1]:.0f} %"
    right.axvline(k, color=base.COLOURS[1], linestyle="-.", linewidth=1.5, label=text)


def layer_curve(
    curves: HeadProfile | Sequence[float] | Mapping[str, HeadProfile | Sequence[float]],
    starts: Sequence[int] | None = None,
    *,
    title: str = "",
) -> Any:
    """The layer curve, with the stages shaded in turn.

    Args:
        curves: a HeadProfile, a curve of L numbers, or several of them by label.
        starts: first layer of every stage, ascending, the first 0; default: no stages are drawn.
        title: over the figure.
    Returns:
        a matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing.
        ValueError: no curve or one that is not finite; starts that do not begin at 0, ascend and lie in the curve.
    Source: docs/method.md "Layer stages".
    """
    several = base.named(curves, (HeadProfile, Sequence), "curves")
    lines = {
        label: base.numbers(entry.curve if isinstance(entry, HeadProfile) else entry, "curve")
        for label, entry in several.items()
    }
    count = max(map(len, lines.values()))
    edges = _edges(starts, count)
    width = min(12.0, max(5.5, 2.0 + 0.2 * count))
    figure = base.new_figure(width, 3.6)
    axis = figure.subplots()
    for stage, (start, end) in enumerate(pairwise(edges)):
        axis.axvspan(start - 0.5, end - 0.5, color="0.88" if stage % 2 else "0.96", zorder=0, linewidth=0)
        if stage:
            axis.axvline(start - 0.5, color="0.45", linestyle="--", linewidth=0.9, zorder=1)
        axis.text(
            (start + end - 1) / 2, 1.01, str(stage), transform=axis.get_xaxis_transform(), ha="center", fontsize=8
        )
    for index, (label, line) in enumerate(lines.items()):
        axis.plot(range(len(line)), line, label=label, markersize=4, **base.style(index))
    axis.set_xlim(-0.5, count - 0.5)
    base.ticks(axis.xaxis, count, width - 1.2)
    axis.set_xlabel("layer")
    axis.set_ylabel("sum over the heads\nof exp(entropy)")
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize=8)
    stages = f"; stages begin at {', '.join(map(str, edges[:-1]))}" if starts is not None else ""
    axis.set_title(title or f"Layer curve{stages}", fontsize=10, pad=16 if starts is not None else 6, wrap=True)
    return figure


def _edges(starts: Sequence[int] | None, count: int) -> list[int]:
    if starts is None:
        return []
    found = [int(start) for start in starts]
    if not found or found[0] != 0 or any(a >= b for a, b in pairwise(found)) or found[-1] >= count:
        raise ValueError(f"uncomp.figures: starts must ascend from 0 and stay below {count} layers; got {list(starts)}")
    return [*found, count]


def group_map(profile: HeadProfile, plan: HeadPlan | None = None, *, title: str = "", **options: Any) -> Any:
    """Map of the groups of all rows; the colour bar says what a row of each group may store.

    Args:
        profile: the HeadProfile.
        plan: what to draw; default: head_plan(profile, **options).
        title: over the figure.
        options: of head_plan: num_groups, rows, scope, budget, shape, floor.
    Returns:
        a matplotlib Figure.
    Raises:
        ImportError: matplotlib is missing. ValueError: as head_plan, or options beside a plan.
    Source: docs/method.md "Grouping", "Budget".
    """
    if plan is not None and options:
        raise ValueError(f"uncomp.figures: give a plan or its options, not both; got {', '.join(options)}")
    plan = plan or head_plan(profile, **options)
    count = plan.num_groups
    size = base.cells(len(plan.groups), len(plan.groups[0]))
    size = size[0], max(size[1], 0.19 * min(count, 16))  # the colour bar has a line of text for each group
    figure = base.new_figure(size[0] + 2.4, size[1] + 1.0)
    axis = figure.subplots()
    from matplotlib import colormaps

    colours = colormaps[base.GROUPS].resampled(count)
    image = _table(axis, plan.groups, size, cmap=colours, vmin=-0.5, vmax=count - 0.5)
    axis.set_ylabel("KV head" if plan.rows == "kv_head" else "query head")
    bar = figure.colorbar(image, ax=axis, fraction=0.06, pad=0.02, aspect=base.bar_aspect(size[1]))
    shown = range(0, count, -(-count // 16))
    bar.set_ticks(list(shown))
    tokens = plan.tokens()
    names = [f"{low}" if low == high else f"{low} to {high}" for low, high in (tokens[group] for group in shown)]
    bar.set_ticklabels([f"{group}: {name}" for group, name in zip(shown, names, strict=True)], fontsize=8)
    bar.ax.minorticks_off()
    bar.set_label("group: tokens a row", fontsize=9)
    if len(plan.groups) * 0.35 <= size[0] and len(plan.groups[0]) * 0.17 <= size[1]:
        _numbers(axis, plan)
    where = "in each layer" if plan.scope == "layer" else "over the whole model"
    axis.set_title(title or f"{count} groups {where}, {profile.model.type}", fontsize=10)
    return figure


def _numbers(axis: Any, plan: HeadPlan) -> None:
    """Tokens into the cells, where they are large enough."""
    for layer, (ids, limits) in enumerate(zip(plan.groups, plan.limits, strict=True)):
        for row, (group, limit) in enumerate(zip(ids, limits, strict=True)):
            light = 2 * group >= plan.num_groups
            axis.text(layer, row, str(limit), ha="center", va="center", fontsize=7, color="black" if light else "white")
