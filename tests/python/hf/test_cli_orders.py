# SPDX-License-Identifier: Apache-2.0
"""`uncomp study order`: its means, that every order runs at one budget, the command on a tiny model, its bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf.test_load import make_folder  # noqa: E402
from uncomp import UncompConfig, calibrate, cli  # noqa: E402
from uncomp.calibration import orders  # noqa: E402
from uncomp.eval.perplexity import score, windows  # noqa: E402
from uncomp.testing import tiny_model  # noqa: E402

pytestmark = pytest.mark.hf
SMALL = ("--prefix", "60", "--continuation", "8", "--pieces", "2", "--budget", "16", "--groups", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    make_folder(path)
    (path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40, encoding="utf-8")
    text, out = str(path / "text.txt"), str(path / "p.json")
    options = ["--samples", "2", "--seqlen", "64", "--device", "cpu", "--out", out]
    assert cli.main(["calibrate", "--model", str(path), "--text", text, *options]) == 0
    return path


def call(folder, capsys, *options, text="text.txt", profile="p.json"):
    """(status, stdout, stderr)"""
    named = ["--model", str(folder), "--text", str(folder / text), "--profile", str(folder / profile)]
    try:
        status = cli.main(["study", "order", *named, *options])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


# ---- values
def test_every_order_runs_at_one_budget(tmp_path):
    """Each number is what score gives alone; random is the mean of its draws; nothing but the order differs."""
    model, path = tiny_model("llama"), str(tmp_path / "p.json")
    ids = torch.randint(3, 199, (300,), generator=torch.Generator().manual_seed(1))
    calibrate(model, None, ids, samples=2, seqlen=64, out=path)
    lines = []
    options = {"budget": 24, "prefix": 100, "continuation": 10, "pieces": 2, "draws": 2, "progress": lines.append}
    found = {each.order: each for each in orders.study_orders(model, ids, path, **options)}
    assert list(found) == ["profile", "online", "reverse", "random", "equal", "full"]
    assert {name: each.stored for name, each in found.items()} == {**dict.fromkeys(found, 24), "full": 100}
    assert found["profile"].share == 0.24 and len(lines) == 14 and lines[-1].startswith("13 of 14 runs, piece 1, equal")
    cut = windows(ids, 100, 10, 2)
    common = {"budget": 24, "groups": 8, "group_scope": "model"}
    alone = {
        "full": [[score(model, *piece, None, mode="chunk")] for piece in cut],
        "reverse": [
            [score(model, *piece, UncompConfig(**common, profile=path, order="reverse"), mode="chunk")] for piece in cut
        ],
        "random": [
            [score(model, *p, UncompConfig(**common, order="random", seed=s), mode="chunk") for s in (1, 2)]
            for p in cut
        ],
    }
    for name, by_piece in alone.items():
        want = [sum(one.loss for one in some) / len(some) for some in by_piece]
        assert found[name].loss == pytest.approx(sum(want) / 2)
        over = [loss - full[0].loss for loss, full in zip(want, alone["full"], strict=True)]
        assert found[name].over_full == pytest.approx(over)
        assert found[name].perplexity == pytest.approx(math.exp(found[name].loss))
    assert found["full"].over_full == (0, 0) and found["full"].agreement == 1
    assert len({found[name].loss for name in ("profile", "reverse", "random", "equal")}) == 4


@pytest.mark.parametrize("draws", [0, True, 1.5])
def test_draws_are_a_number(draws):
    with pytest.raises(ValueError, match=r"^uncomp\.calibration: draws must be an integer of at least 1; got"):
        orders.configs("p.json", 24, 2, "layer", draws)


# ---- the command
def test_lines(folder, capsys):
    status, printed, err = call(folder, capsys, *SMALL)
    assert (status, err) == (0, "")
    lines = printed.splitlines()
    assert lines[0] == "2 prefixes of 60 tokens, 8 scored behind each; 2 groups, scope model"
    names = [line.split()[0] for line in lines[1:]]
    assert names == ["order", "profile", "online", "reverse", "random", "equal", "full"]
    assert lines[2].split()[1:4] == ["16.0", "26.7", "%"]


def test_json_and_file(folder, tmp_path, capsys):
    out = tmp_path / "o.json"
    status, printed, err = call(folder, capsys, *SMALL, "--json", "--out", str(out))
    assert (status, err) == (0, "")
    assert json.loads(printed) == json.loads(out.read_text())
    assert [len(each["over_full"]) for each in json.loads(printed)["orders"]] == [2] * 6


@pytest.mark.parametrize(
    ("files", "options", "line"),
    [
        ({"text": "none.txt"}, (), 'none.txt" cannot be read'),
        ({"profile": "none.json"}, (), 'none.json" is no file'),
        ({"profile": "text.txt"}, (), "is not a whole JSON file"),
        ({}, ("--prefix", "0"), "--prefix must be at least 1; got 0"),
        ({}, ("--draws", "0"), "--draws must be at least 1; got 0"),
        ({}, ("--prefix", "99999"), "ids must be at least 100007 tokens; got"),
        ({}, ("--groups", "99"), "groups must"),
        ({}, ("--budget", "4"), "budget must"),
        ({}, ("--out", "/nowhere/o.json"), '--out "/nowhere/o.json" lies in no folder that exists'),
    ],
)
def test_bad_input_is_one_line(folder, capsys, files, options, line):
    status, printed, err = call(folder, capsys, *SMALL, *options, **files)
    assert (status, printed, err.count("\n")) == (2, "", 1), err
    assert err.startswith("uncomp") and line in err
