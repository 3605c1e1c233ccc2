# SPDX-License-Identifier: Apache-2.0
"""A figure of a compressed cache: entropy and stored tokens by layer and head, bytes beside the full cache."""

from __future__ import annotations

import math
import os
from typing import Any

from uncomp.figures import base

_COLOURS = {"full": "#999999", "compressed": "#0072B2"}  # told apart in grey and by every kind of colour blindness


def draw(report: Any, path: str | os.PathLike[str], *, full: Any = None, title: str = "") -> None:
    """Writes the figure of one run.

    Args:
        report: a GenerationReport of a compressed run.
        path: the file; its ending says the format.
        full: the report of the full cache, whose bytes are shown if given; else the bytes it would have.
        title: a line over the figure.
    Raises:
        ImportError, ValueError: as `figures.check`; ValueError for a report without rows.
    """
    base.check(path)
    if not report.stored:
        raise ValueError("uncomp.figures: report must be of a compressed cache; it has no stored tokens by head")
    tables = [("stored tokens", report.stored, "cividis")]
    if report.entropy is not None:
        tables.insert(0, ("entropy of the queries, share of ln D", report.entropy, "viridis"))
    height = min(12.0, max(4.2, 1.6 + 0.16 * len(report.stored)))
    figure = base.new_figure(4.2 * len(tables) + 3.6, height)
    axes = figure.subplots(1, len(tables) + 1, squeeze=False)[0]
    for axis, (label, table, colours) in zip(axes, tables, strict=False):
        _heat(figure, axis, table, label, colours)
    _bytes(axes[-1], report, full)
    figure.suptitle(title or f"{report.policy}: {report.prompt_tokens} prompt tokens, {report.new_tokens} new ones")
    base.save(figure, path)


def _heat(figure: Any, axis: Any, table: list[list[float]], label: str, colours: str) -> None:
    from matplotlib.ticker import MaxNLocator

    image = axis.imshow(table, aspect="auto", cmap=colours, interpolation="nearest")
    axis.set_xlabel("cache row (KV head)" if len(table[0]) > 1 else "cache row")
    axis.set_ylabel("compressed layer")
    axis.set_title(label, fontsize=10)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axis, fraction=0.05)


def _bytes(axis: Any, report: Any, full: Any) -> None:
    values = [full.cache_bytes if full is not None else report.full_cache_bytes, report.cache_bytes]
    names, unit = ["full", "compressed"], _unit(max(values))
    bars = axis.bar(names, [v / unit[1] for v in values], color=[_COLOURS[n] for n in names], edgecolor="black")
    axis.bar_label(bars, [f"{v / unit[1]:.4g}" for v in values], padding=2)
    axis.set_ylabel(f"keys and values, {unit[0]}")
    axis.margins(y=0.12)
    axis.set_title(f"cache, {100 * values[1] / max(values[0], 1):.2f} % of full", fontsize=10)


def _unit(largest: int) -> tuple[str, int]:
    """Name and bytes of the binary unit that gives a readable number."""
    power = min(4, int(math.log2(max(largest, 1)) // 10))
    return ("bytes", "KiB", "MiB", "GiB", "TiB")[power], 1 << (10 * power)
