# SPDX-License-Identifier: Apache-2.0
"""What all figures share: matplotlib or one clear line, colours, sizes, ticks, files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

# Told apart by every kind of colour blindness (the colours of Okabe and Ito), and by line and marker in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SEQUENTIAL = "viridis"  # light means much; lightness rises evenly, so it is also read in grey
GROUPS = "cividis"
SIGNED = "PuOr"  # -1 to 1, white is 0
DPI = 150


def _matplotlib(why: str = "a figure") -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"uncomp.figures: {why} needs matplotlib ({error}); pip install matplotlib") from error
    return matplotlib


def formats() -> list[str]:
    """Endings of the files that can be written.

    Raises:
        ImportError: matplotlib is missing.
    """
    _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return sorted(FigureCanvasAgg.get_supported_filetypes())


def check(path: str | os.PathLike[str]) -> None:
    """Says before the work whether a figure can be written to this file.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no folder of that name, or an ending that is no picture.
    """
    path, known = Path(path), formats()
    if path.suffix.lstrip(".").lower() not in known:
        raise ValueError(f'uncomp.figures: figure must end in one of {", ".join(known)}; got "{path}"')
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f'uncomp.figures: figure "{path}" cannot be written: "{path.parent}" must be a folder')


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure; its ending says the format. A reader sees the old file or the whole new one.

    Raises:
        ImportError, ValueError: as `check`.
        OSError: the disk is full or the file cannot be replaced.
    """
    check(path)
    path = Path(path)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(beside, dpi=DPI)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def png(figure: Any) -> bytes:
    """The figure as a PNG picture."""
    import io

    found = io.BytesIO()
    figure.savefig(found, format="png", dpi=DPI)
    return found.getvalue()


@lru_cache(maxsize=1)
def _figure_class() -> type:
    """A Figure that a notebook shows without pyplot, so that no figure is kept open behind the caller's back."""
    _matplotlib()
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            FigureCanvasAgg(self)

        def _repr_png_(self) -> bytes:
            data = io.BytesIO()
            self.savefig(data, format="png", dpi=100)
            return data.getvalue()

    return ShownFigure


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches; its _repr_png_ shows it in a notebook.

    Raises:
        ImportError: matplotlib is missing.
    """
    return _figure_class()(figsize=(width, height), layout="constrained")


def cells(columns: int, rows: int) -> tuple[float, float]:
    """Inches of a table of so many cells: neither a stamp for 4 layers nor a poster for 128 heads."""
    wide = columns * min(0.5, max(0.1, 7.0 / columns))
    high = rows * min(0.42, max(0.065, 4.2 / rows))
    return max(wide, 3.4), max(high, 1.1)


def bar_aspect(inches: float) -> float:
    """Height of a colour bar over its width, so that it stays a fifth of an inch wide."""
    return max(5.0, inches / 0.2)


def ticks(axis: Any, count: int, inches: float) -> None:
    """Whole numbers on the axis of a table, evenly spaced, with room between them."""
    room = max(2, int(inches / 0.26))
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 10**9) if (count + s - 1) // s <= room)
    axis.set_ticks(range(0, count, step))
    axis.set_tick_params(labelsize=8)


def named(value: Any, kind: type, what: str) -> dict[str, Any]:
    """One thing, or a mapping of labels to several, as a mapping.

    Raises:
        ValueError: an empty mapping.
        TypeError: something else in it.
    """
    table = dict(value) if isinstance(value, Mapping) else {"": value}
    if not table:
        raise ValueError(f"uncomp.figures: {what} must hold at least one entry; got an empty mapping")
    for entry in table.values():
        if not isinstance(entry, kind):
            raise TypeError(f"uncomp.figures: {what} must be {kind.__name__}; got {type(entry).__name__}")
    return table


def style(index: int) -> dict[str, Any]:
    """Colour, line and marker of the index-th of several lines; any two differ in all three while there are few."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def numbers(values: Sequence[float], name: str) -> list[float]:
    """Finite floats.

    Raises:
        ValueError: none of them, or NaN or Inf among them.
    """
    found = [float(v) for v in values]
    if not found or any(v != v or abs(v) == float("inf") for v in found):
        raise ValueError(f"uncomp.figures: {name} must hold finite numbers; got {found[:4]}")
    return found
