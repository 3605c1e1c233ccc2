# SPDX-License-Identifier: Apache-2.0
"""`uncomp calibrate` on a tiny saved model: what it prints and writes, a real kill, and one line for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf.test_load import make_folder  # noqa: E402
from uncomp import HeadProfile, cli  # noqa: E402

pytestmark = pytest.mark.hf
ROOT = Path(__file__).resolve().parents[3]
SMALL = ("--samples", "4", "--seqlen", "64", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    make_folder(path)
    (path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40, encoding="utf-8")
    (path / "short.txt").write_text("too short")
    (path / "empty.txt").write_text(" \n")
    (path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    return path


def call(folder, capsys, *options, text="text.txt"):
    """(status, stdout, stderr)"""
    try:
        status = cli.main(["calibrate", "--model", str(folder), "--text", str(folder / text), *options])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def test_lines_and_file(folder, tmp_path, capsys):
    out = tmp_path / "p.json"
    status, printed, err = call(folder, capsys, *SMALL, "--groups", "2", "--out", str(out))
    assert (status, err) == (0, "")
    profile = HeadProfile.load(out)
    assert (profile.model.L, profile.model.Hq, profile.model.Hkv, profile.run.k) == (2, 4, 2, 2)
    for line in ("4 of 64 tokens", "rank correlation", str(out), f"layer 1            {profile.groups(1, 2)[0]}"):
        assert line in printed


def test_json(folder, tmp_path, capsys):
    out = tmp_path / "p.json"
    options = ("--groups", "4", "--top-eigenvalues", "elbow", "--tensor", "key", "--rope", "before", "--json")
    status, printed, err = call(folder, capsys, *SMALL, *options, "--out", str(out))
    assert (status, err) == (0, "")
    found, profile = json.loads(printed), HeadProfile.load(out)
    assert found["k"] == found["elbow"] == profile.elbow
    assert (found["tensor"], found["rope"], found["rows"]) == ("key", "before", "query_head")
    assert found["groups"] == [profile.groups(layer, 4, "query_head") for layer in range(2)]
    assert found["stability"] == profile.stability


def test_a_kill_loses_nothing(folder, tmp_path):
    """SIGKILL between two samples; the same command goes on and writes the file of a run that was left alone."""
    options = ["--model", str(folder), "--text", str(folder / "text.txt"), "--samples", "120", "--seqlen", "128"]
    command = [sys.executable, "-m", "uncomp", "calibrate", *options, "--device", "cpu", "--out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole.json")], cwd=ROOT, env=env, check=True, capture_output=True)
    out, state = tmp_path / "p.json", tmp_path / "p.json.state"
    run = subprocess.Popen([*command, str(out)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not state.exists() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and state.exists() and not out.exists()
    subprocess.run([*command, str(out)], cwd=ROOT, env=env, check=True, capture_output=True)
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "whole.json"]


@pytest.mark.parametrize(
    ("text", "options", "line"),
    [
        ("none.txt", (), 'none.txt" cannot be read (No such file or directory)'),
        ("empty.txt", (), 'empty.txt" is empty'),
        ("latin.txt", (), 'latin.txt" is not UTF-8 (byte 3)'),
        ("short.txt", (), "texts must have at least 64 tokens for seqlen = 64; got 9"),
        ("text.txt", ("--samples", "0"), "--samples must be at least 1; got 0"),
        ("text.txt", ("--seqlen", "1"), "--seqlen must be at least 2; got 1"),
        ("text.txt", ("--groups", "5"), "--groups must lie in [1, 4], the query heads of a layer; got 5"),
        ("text.txt", ("--top-eigenvalues", "9"), "top must be an integer from 1 to 8"),
        ("text.txt", ("--top-eigenvalues", "few"), "must be a number, elbow or all; got 'few'"),
        ("text.txt", ("--tensor", "value", "--rope", "before"), 'rope must be "after" for tensor value'),
        ("text.txt", ("--out", "/nowhere/p.json"), 'out "/nowhere/p.json" cannot be written'),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, text, options, line):
    out = tmp_path / "p.json"
    status, printed, err = call(folder, capsys, *SMALL, "--out", str(out), *options, text=text)
    assert (status, printed, err.count("\n")) == (2, "", 1), err
    assert err.startswith("uncomp") and line in err
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_other_settings_is_one_line(folder, tmp_path, capsys):
    out = tmp_path / "p.json"
    (tmp_path / "p.json.state").write_bytes(b"nothing")
    status, _, err = call(folder, capsys, *SMALL, "--out", str(out))
    assert status == 2 and err.count("\n") == 1 and "is no state of a run" in err
