# SPDX-License-Identifier: Apache-2.0
"""Every example runs as a user would start it, on CPU, in under a minute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
NEEDS_NO_TRANSFORMERS = ("020_use_the_ops",)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path):
    if path.stem not in NEEDS_NO_TRANSFORMERS:
        pytest.importorskip("transformers")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=env, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
