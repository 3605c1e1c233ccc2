# SPDX-License-Identifier: Apache-2.0
"""The command line without a model: what is printed, and one line and status 2 for every input that is bad."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import uncomp
from uncomp import cli

ROOT = Path(__file__).resolve().parents[2]


def refused(capsys, *arguments) -> str:
    """The one line on stderr of a call that ends with status 2 and prints nothing else."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert status == 2, err
    assert out == "" and err.endswith("\n") and err.count("\n") == 1, err
    assert err.startswith("uncomp"), err
    return err


def test_module_and_version():
    """`python -m uncomp` in a fresh process; a bad call leaves one line and no traceback."""
    call = [sys.executable, "-m", "uncomp"]
    done = subprocess.run([*call, "--version"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == f"uncomp {uncomp.__version__}\n"
    done = subprocess.run([*call, "nothing"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("options", [["info"], ["info", "--json"]], ids=" ".join)
def test_stdout_on_a_full_disk(options):
    with open("/dev/full", "w") as full:
        call = [sys.executable, "-m", "uncomp", *options]
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("uncomp: stdout or a file cannot be written (No space left")


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("version", "torch", "cuda", "transformers", "model_types", "llama", "policies", "snapkv"):
        assert word in out


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == uncomp.__version__
    assert found["policies"] == uncomp.known_policies()
    assert {"torch_running", "cuda", "head_dims", "transformers", "gpus", "model_types", "models"} <= found.keys()


def test_info_does_not_import_transformers():
    code = "import sys; from uncomp.cli import main; main(['info']); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)


# ---- bad input
def test_no_command(capsys):
    assert "COMMAND" in refused(capsys)
    assert "invalid choice: 'compress'" in refused(capsys, "compress")


def test_prompts(capsys, tmp_path):
    call = ("generate", "--model", "m")
    both = refused(capsys, *call, "--prompt", "a", "--prompt-file", "b")
    assert "--prompt-file: not allowed with argument --prompt" in both
    assert "--prompt --prompt-file is required" in refused(capsys, *call)
    missing = tmp_path / "none.txt"
    assert refused(capsys, *call, "--prompt-file", str(missing)) == (
        f'uncomp generate: prompt file "{missing}" cannot be read (No such file or directory)\n'
    )
    assert "(Is a directory)" in refused(capsys, *call, "--prompt-file", str(tmp_path))
    missing.write_bytes(b"")
    assert f'prompt file "{missing}" is empty' in refused(capsys, *call, "--prompt-file", str(missing))
    missing.write_bytes(b"ab\xff\xfe")
    assert f'prompt file "{missing}" is not UTF-8 (byte 2)' in refused(capsys, *call, "--prompt-file", str(missing))
    assert "--prompt is empty" in refused(capsys, *call, "--prompt", " \n")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--budget", "0"], "budget must be at least window + sinks"),
        (["--budget", "0.0"], "budget must be a share in (0, 1]"),
        (["--budget", "1.5"], "budget must be a share in (0, 1]"),
        (["--budget", "nan"], "budget must be"),
        (["--budget", "many"], "must be whole tokens or a share like 0.0938; got 'many'"),
        (["--policy", "magic"], "policy must be one of"),
        (["--groups", "0"], "groups must be an integer from 1"),
        (["--window", "0"], "window must be an integer from 1"),
        (["--sinks", "-1"], "sinks must be"),
        (["--rows", "head"], "--rows: invalid choice"),
        (["--decode", "shrink"], "--decode: invalid choice"),
        (["--preset", "best"], "--preset: invalid choice"),
        (["--max-new-tokens", "x"], "invalid int value: 'x'"),
        (["--profile", "/none.json"], 'profile "/none.json" is no file'),
        (["--figure", "/none/out.png"], 'figure "/none/out.png" cannot be written'),
        (["--figure", "out.xyz"], "figure must end in one of"),
        (["--stages", "0,5,3"], "uncomp.PrefillPruning: stages must be"),
        (["--stages", "online"], "stages must be"),
        (["--stages", "0,2", "--n-min", "0"], "n_min must be tokens"),
        (["--stages", "0,2", "--n-min", "many"], "must be whole tokens or a share like 0.25; got 'many'"),
        (["--n-min", "64"], "--n-min needs --stages or --policy uncomp_stage; got neither"),
    ],
)
def test_options(capsys, options, wanted):
    if "--figure" in options:
        pytest.importorskip("matplotlib")
    assert wanted in refused(capsys, "generate", "--model", "m", "--prompt", "a", *options)


def test_a_figure_without_matplotlib(capsys, monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    call = ("generate", "--model", "m", "--prompt", "a", "--figure", str(tmp_path / "a.png"))
    assert "a figure needs matplotlib" in refused(capsys, *call)


def test_devices(capsys):
    pytest.importorskip("transformers")
    call = ("generate", "--model", "m", "--prompt", "a")
    assert "device must be one that torch knows; got toaster" in refused(capsys, *call, "--device", "toaster")
    assert "dtype must be auto, float32, float16, bfloat16; got int8" in refused(capsys, *call, "--dtype", "int8")
    if not torch.cuda.is_available():
        assert "device cuda is not there; torch sees 0 GPUs" in refused(capsys, *call, "--device", "cuda")


def test_without_transformers(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'transformers" in refused(capsys, "generate", "--model", "m", "--prompt", "a")


def test_a_fault_keeps_its_traceback(monkeypatch):
    """Only what the package refuses becomes one line."""

    def broken(*args):
        raise RuntimeError("not ours")

    monkeypatch.setattr(cli, "_info", broken)
    with pytest.raises(RuntimeError, match="not ours"):
        cli.main(["info"])


@pytest.mark.parametrize(("error", "status"), [(MemoryError(), 1), (torch.OutOfMemoryError("x"), 1)])
def test_out_of_memory_is_one_line(monkeypatch, capsys, error, status):
    def full(*args):
        raise error

    monkeypatch.setattr(cli, "_info", full)
    assert cli.main(["info"]) == status
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupt_is_quiet(monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", stop)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == ""


def test_progress_writes_over_itself(capsys):
    progress = cli._Progress(True)
    progress.label = "full"
    progress("prefill 10.0 s")
    progress("2")
    progress.clear()
    assert capsys.readouterr().err.startswith("\rfull: prefill 10.0 s\rfull: 2 ")
    cli._Progress(False)("nothing")
    assert capsys.readouterr().err == ""
