# SPDX-License-Identifier: Apache-2.0
"""Records of an evaluation are the same however many processes share them and whenever they are killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import eval_support as support
from eval_support import arguments, ran, steady

from uncomp import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return support.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return support.make_longbench(tmp_path_factory.mktemp("data") / "longbench", records=4)


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """Undisturbed runs, one prompt a batch."""
    out = tmp_path_factory.mktemp("finished")
    assert cli.main(arguments(model, data, out, "--policy", "uncomp", "--policy", "full")) == 0
    return out / "longbench"


@pytest.mark.slow
def test_resume_after_a_kill(finished, model, data, tmp_path, capsys):
    """SIGKILL while it runs: the rest is run, with another batch size, and nothing is lost, doubled or changed."""
    options = arguments(model, data, tmp_path, "--policy", "uncomp", "--question", "aware")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-m", "uncomp", *options], env=env, cwd=tmp_path)
    part = tmp_path / "longbench/uncomp-40-aware/part-0.jsonl"
    limit = time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") >= 2) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = part.read_bytes()
    with open(part, "ab") as file:
        file.write(b'{"subset": "trec", "id": "tre')  # what a kill in the middle of a write would leave
    again = ["--policy", "uncomp", "--resume", "--batch-size", "2"]
    ran(capsys, model, data, tmp_path, *again)
    assert part.read_bytes().startswith(before)
    folder = tmp_path / "longbench/uncomp-40-aware"
    assert [{**r, "agreement": 0} for r in steady(folder)] == [
        {**r, "agreement": 0} for r in steady(finished / "uncomp-40-aware")
    ]
    assert len(part.read_text().splitlines()) == 8
    ran(capsys, model, data, tmp_path, *again)  # nothing is left to do
    assert len(part.read_text().splitlines()) == 8


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(finished, model, data, tmp_path, capsys):
    """Started as torchrun and `accelerate launch` start them: by environment variables, over gloo."""
    options = arguments(model, data, tmp_path, "--policy", "full", "--policy", "uncomp", "--json")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "uncomp", *options],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    out = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert len(out[0].splitlines()) == 2 and out[1] == ""
    for name in ("full-full-aware", "uncomp-40-aware"):
        folder = tmp_path / "longbench" / name
        assert steady(folder) == steady(finished / name)
        parts = [folder / f"part-{rank}.jsonl" for rank in range(2)]
        assert [len(part.read_text().splitlines()) for part in parts] == [4, 4]
    kept = [part.read_text().splitlines(keepends=True)[:keep] for part, keep in zip(parts, (1, 3), strict=True)]
    for part, lines in zip(parts, kept, strict=True):  # as after a kill of both; one process goes on
        part.write_text("".join(lines) + '{"subset')
    ran(capsys, model, data, tmp_path, "--policy", "uncomp", "--resume")
    assert steady(folder) == steady(finished / "uncomp-40-aware")
    assert parts[1].read_text() == "".join(kept[1])
