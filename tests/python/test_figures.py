# SPDX-License-Identifier: Apache-2.0
"""Figures: every shape is drawn within sensible sizes, shows what it says, and what cannot be drawn is refused."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from profile_support import made_profile

pytest.importorskip("matplotlib")

from uncomp import figures
from uncomp.calibration.summary import head_plan

SHAPES = [(4, 3, 3), (30, 9, 3), (32, 32, 8), (80, 64, 8), (80, 128, 128), (1, 1, 1)]


def drawn(figure):
    """Renders it, so that labels and ticks have their place; no text may leave the figure."""
    figure.canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    for axis in figure.axes:
        box = axis.get_tightbbox()
        assert box.x0 > -3 and box.y0 > -3 and box.x1 < width + 3 and box.y1 < height + 3, axis.get_title()
    assert 3 < width / figure.dpi < 18 and 1.5 < height / figure.dpi < 11
    return figure


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_of_every_shape(shape):
    profile = made_profile(*shape, samples=2)
    layers, heads, rows = shape
    figure = drawn(figures.entropy_map(profile))
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (heads, layers)  # layers run from left to right
    assert image[0, -1] == profile.entropy[-1][0]
    assert len(figure.axes[0].lines) == (rows - 1 if rows < heads else 0)
    plan = head_plan(profile)
    figure = drawn(figures.group_map(profile))
    assert figure.axes[0].images[0].get_array()[rows - 1, 0] == plan.groups[0][rows - 1]
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels[0].startswith(f"0: {plan.tokens()[0][0]}")
    drawn(figures.layer_curve(profile))


@pytest.mark.parametrize("axis", ["xaxis", "yaxis"])
def test_ticks_do_not_touch(axis):
    figure = drawn(figures.entropy_map(made_profile(80, 128, 128, samples=2)))
    boxes = [t.get_window_extent() for t in getattr(figure.axes[0], axis).get_ticklabels() if t.get_text()]
    edges = sorted((b.x0, b.x1) if axis == "xaxis" else (b.y0, b.y1) for b in boxes)
    assert len(edges) > 5
    assert all(a[1] < b[0] for a, b in pairwise(edges))


def test_the_elbow_is_marked():
    """Of .5 .2 .1 .08 .06 .03 .02 .01 the third hangs furthest below the chord."""
    profile = made_profile(2, 2, 2, 8)
    object.__setattr__(profile, "spectrum", (0.5, 0.2, 0.1, 0.08, 0.06, 0.03, 0.02, 0.01))
    left, right = drawn(figures.spectrum_decay(profile)).axes
    assert next(iter(left.get_legend().get_texts())).get_text() == "elbow 3"
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["elbow 3: 80 %", "measured with k = 2: 70 %"]


def test_stages_of_a_curve():
    axis = drawn(figures.layer_curve([5, 4, 6, 3, 3.5], [0, 1, 3])).axes[0]
    assert [t.get_text() for t in axis.texts] == ["0", "1", "2"]
    assert "0, 1, 3" in axis.get_title()
    for starts in ([], [1], [0, 5], [0, 3, 3]):
        with pytest.raises(
            ValueError, match=r"^uncomp.figures: starts must ascend from 0 and stay below 5 layers; got"
        ):
            figures.layer_curve([5, 4, 6, 3, 3.5], starts)
    with pytest.raises(ValueError, match=r"^uncomp.figures: curve must hold finite numbers"):
        figures.layer_curve([1.0, float("nan")])


def test_several_profiles():
    several = {name: made_profile(6, 8, 4, noise=0.1, seed=i) for i, name in enumerate(("wiki", "essays", "code"))}
    figure = drawn(figures.correlation(several))
    assert figure.axes[0].images[0].get_array().diagonal().tolist() == [1, 1, 1]
    assert [t.get_text() for t in figure.axes[2].get_legend().get_texts()] == ["essays", "code"]
    assert len(drawn(figures.layer_curve(several)).axes[0].lines) == 3
    assert len(drawn(figures.spectrum_decay(several)).axes[0].lines) == 3
    with pytest.raises(ValueError, match="at least two to correlate; got 1"):
        figures.correlation({"wiki": several["wiki"]})
    with pytest.raises(ValueError, match="at least one entry"):
        figures.spectrum_decay({})
    with pytest.raises(TypeError, match="profiles must be HeadProfile; got str"):
        figures.spectrum_decay("profile.json")


def test_bars():
    axis = drawn(figures.bars({"one": 2.0, "several": [1.0, 2.0, 3.0]}, "nats", baseline=0.5)).axes[0]
    assert [patch.get_height() for patch in axis.patches] == [2, 2]
    with pytest.raises(ValueError, match="finite numbers"):
        figures.bars({"one": []}, "nats")


def test_lines():
    axis = drawn(figures.lines({"a": {64: 2.0, 32: 3.0}, "b": {64: 1.0}}, "tokens", "nats", baseline=0.5)).axes[0]
    assert axis.lines[0].get_xdata().tolist() == [32, 64] and axis.lines[0].get_ydata().tolist() == [3, 2]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["32", "64"]
    for values in ({}, {"a": {}}, {"a": {1: float("inf")}}):
        with pytest.raises(ValueError, match=r"^uncomp"):
            figures.lines(values, "tokens", "nats")


def test_plan_and_options_together():
    profile = made_profile(4, 4, 4)
    with pytest.raises(ValueError, match="give a plan or its options, not both; got budget"):
        figures.group_map(profile, head_plan(profile), budget=3)


def test_a_notebook_shows_a_figure_without_pyplot():
    figure = figures.entropy_map(made_profile(4, 4, 4))
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    figure = figures.entropy_map(made_profile(4, 4, 4))
    path = tmp_path / "a.png"
    figures.save(figure, path)
    before = path.read_bytes()

    def broken(file, **options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        figures.save(figure, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]
