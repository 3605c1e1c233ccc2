# SPDX-License-Identifier: Apache-2.0
"""Files of a calibration run on a tiny model: the same bytes twice and after a kill, no part of a file, progress."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from hf.test_calibrate import TEXT, run
from uncomp import HeadProfile
from uncomp.calibration import collect, files, state
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf


# ---- files of a run
def test_two_runs_write_the_same_bytes(tmp_path):
    model = tiny_model("llama")
    for name in ("a.json", "b.json"):
        run(model, out=tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert HeadProfile.load(tmp_path / "a.json") == run(model)
    assert run(model, seed=1) != run(model)


@pytest.mark.parametrize("top", [None, "elbow"])
@pytest.mark.parametrize(("batch_size", "stop"), [(1, 5), (1, 6), (3, 2)])
def test_a_killed_run_goes_on(tmp_path, monkeypatch, batch_size, stop, top):
    """Stopped in any batch and called again it writes the bytes of a run that was not stopped, in fewer forwards."""
    model, options = tiny_model("llama"), {"samples": 10, "batch_size": batch_size, "top": top}
    run(model, out=tmp_path / "whole.json", **options)
    monkeypatch.setattr(collect, "SETTLE_SAMPLES", 2)
    take, calls = collect.Sums.take, []

    def killed(self, spectra):
        calls.append(1)
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        take(self, spectra)

    monkeypatch.setattr(collect.Sums, "take", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, out=tmp_path / "p.json", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json.state", "whole.json"]
    before = len(calls)
    run(model, out=tmp_path / "p.json", **options)
    assert (tmp_path / "p.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert len(calls) - before < -(-10 // batch_size)
    assert not (tmp_path / "p.json.state").exists()


@pytest.mark.parametrize(("samples", "seconds"), [(1, 10.0), (3, 10.0), (8, 0.0)])
def test_when_samples_are_counted_does_not_show(monkeypatch, samples, seconds):
    """Counting them one by one, by threes or by the clock gives the profile that counting by eights gives."""
    model = tiny_model("llama")
    wanted = run(model, samples=10, top="elbow")
    monkeypatch.setattr(collect, "SETTLE_SAMPLES", samples)
    monkeypatch.setattr(collect, "SETTLE_SECONDS", seconds)
    settle, calls = collect.Sums.settle, []
    monkeypatch.setattr(collect.Sums, "settle", lambda self: calls.append(1) or settle(self))
    assert run(model, samples=10, top="elbow") == wanted
    assert len(calls) == (4 if samples == 3 else 10)


def test_a_state_of_another_run_is_refused(tmp_path, monkeypatch):
    model, out = tiny_model("llama"), tmp_path / "p.json"
    monkeypatch.setattr(collect, "SETTLE_SAMPLES", 1)
    monkeypatch.setattr(HeadProfile, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, out=out)
    monkeypatch.undo()
    for change, text in (
        ({"seed": 1}, "another seed: 42 there, 1 now"),
        ({"samples": 6}, "another samples: 5 there, 6 now"),
        ({"texts": TEXT + "x"}, "another text: "),
        ({"top": 3}, "another top: 16 there, 3 now"),
        ({"model": tiny_model("llama", rms_norm_eps=1e-3)}, "another model: "),
    ):
        with pytest.raises(ValueError, match=rf'uncomp\.calibrate: "{out}\.state" is of a run with {text}'):
            run(**{"model": model, "out": out, **change})
    path = state.state_path(out)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is no state of a run .*; delete it"):
        run(model, out=out)


def test_a_full_disk_leaves_no_part(tmp_path, monkeypatch):
    """One line; the state of the run stays, so that nothing is lost."""
    model, real = tiny_model("llama"), files.os.fsync

    synced = []

    def full(_):
        synced.append(1)
        if len(synced) > 1:  # the first tries whether the folder takes a file
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        OSError, match=r'uncomp\.calibration: ".*p\.json" cannot be written \(No space left on device\)'
    ):
        run(model, out=tmp_path / "p.json")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(files.os, "fsync", real)
    monkeypatch.setattr(collect, "_run", lambda *_: pytest.fail("measured before it was known that nothing is written"))
    for out, text in (
        ("/nowhere/p.json", r'out "/nowhere/p\.json" cannot be written: "/nowhere" must be a folder .*\(No such file'),
        ("/proc/p.json", r'out "/proc/p\.json" cannot be written: "/proc" must be a folder that can be written to'),
        (tmp_path, r'out ".*" must be a file; it is a folder'),
    ):
        with pytest.raises(ValueError, match=rf"^uncomp\.calibration: {text}"):
            run(model, out=out)
    assert list(tmp_path.iterdir()) == []


def test_progress_tells_rate_and_time_left():
    lines = []
    run(tiny_model("llama"), progress=lines.append)
    assert len(lines) == 5
    assert lines[1].startswith("2 of 5 samples, ") and lines[-1].endswith("tokens/s, 0:00 left")
