# SPDX-License-Identifier: Apache-2.0
"""Figures of compressed caches and of head profiles; matplotlib is imported when one is drawn, not before.

`draw` writes the figure of one run. The others return a matplotlib Figure, which a notebook shows and `save` writes.
"""

from uncomp.figures.base import check, formats, png, save
from uncomp.figures.compare import bars, correlation, lines
from uncomp.figures.evaluation import grouped_bars, needle_map
from uncomp.figures.profile import entropy_map, group_map, layer_curve, spectrum_decay
from uncomp.figures.run import draw

__all__ = [
    "bars",
    "check",
    "correlation",
    "draw",
    "entropy_map",
    "formats",
    "group_map",
    "grouped_bars",
    "layer_curve",
    "lines",
    "needle_map",
    "png",
    "save",
    "spectrum_decay",
]
