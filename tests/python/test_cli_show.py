# SPDX-License-Identifier: Apache-2.0
"""`uncomp show`: the files, the lines, the JSON, and one line and no file for every bad input."""

from __future__ import annotations

import json
import sys

import pytest
from profile_support import made_profile
from test_cli import refused

from uncomp import cli


@pytest.fixture
def paths(tmp_path):
    for i, name in enumerate(("wiki", "code")):
        made_profile(6, 9, 3, noise=0.1, seed=i).save(tmp_path / f"{name}.json")
    made_profile(4, 4, 4).save(tmp_path / "other.json")
    return {name: str(tmp_path / f"{name}.json") for name in ("wiki", "code", "other")} | {"out": str(tmp_path / "out")}


def test_one_profile(paths, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert cli.main(["show", paths["wiki"], "--out", paths["out"], "--stages", "0,2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("wiki: llama, 6 layers, 9 query heads, 3 KV heads, head dim 64\n")
    assert "  stages     begin at layers 0, 2\n" in out
    assert "8 of KV heads over the model; tokens a row" in out
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["curve.png", "entropy.png", "groups.png", "spectrum.png"]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in files)


def test_two_profiles_as_json(paths, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    call = ["show", paths["wiki"], paths["code"], "--out", paths["out"], "--format", "svg", "--json", "--groups", "2"]
    assert cli.main(call) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["profiles"]) == ["wiki", "code"]
    assert found["profiles"]["code"]["groups"]["scope"] == "layer"
    assert found["correlation"]["with"] == "wiki" and -1 <= found["correlation"]["code"]["model"] <= 1
    names = ["correlation", "spectrum", "curve", "wiki-entropy", "wiki-groups", "code-entropy", "code-groups"]
    assert found["files"] == [str(tmp_path / "out" / f"{name}.svg") for name in names]
    assert all((tmp_path / "out" / f"{name}.svg").is_file() for name in names)


def test_files_of_one_name_are_told_apart(paths, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "b").mkdir()
    made_profile(6, 9, 3, seed=4).save(tmp_path / "b" / "wiki.json")
    assert cli.main(["show", paths["wiki"], str(tmp_path / "b" / "wiki.json"), "--out", paths["out"], "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert len(set(files)) == len(files) == len(list((tmp_path / "out").iterdir()))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--groups", "19"], "groups must lie in [1, 18]"),
        (["--groups", "4", "--group-scope", "layer"], "groups must lie in [1, 3], the rows of a layer; got 4"),
        (["--budget", "1"], "budget must be at least window + sinks"),
        (["--shape", "g9"], "shape must be one of"),
        (["--stages", "0,9"], "starts must ascend from 0 and stay below 6 layers"),
        (["--threshold", "-1"], "threshold must be at least 0; got -1"),
        (["--stages", "0", "--threshold", "1"], "not allowed with"),
        (["--stages", "a"], "must be layers like 0,2,15; got 'a'"),
        (["--format", "doc"], "--format must be one of"),
    ],
)
def test_options(paths, capsys, tmp_path, options, wanted):
    pytest.importorskip("matplotlib")
    assert wanted in refused(capsys, "show", paths["wiki"], "--out", paths["out"], *options)
    assert not (tmp_path / "out").exists()


def test_files(paths, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    out = ("--out", paths["out"])
    assert "No such file" in refused(capsys, "show", str(tmp_path / "none.json"), *out)
    assert "is not a whole JSON file" in refused(capsys, "show", cut(paths["wiki"], tmp_path), *out)
    assert "every profile must be another file" in refused(capsys, "show", paths["wiki"], paths["wiki"], *out)
    assert "must be of one model" in refused(capsys, "show", paths["wiki"], paths["other"], *out)
    assert "is a file" in refused(capsys, "show", paths["wiki"], "--out", paths["wiki"])
    assert not (tmp_path / "out").exists()


def cut(path, folder):
    text = (folder / "wiki.json").read_text()
    (folder / "cut.json").write_text(text[: len(text) // 2])
    return str(folder / "cut.json")


def test_without_matplotlib(paths, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "a figure needs matplotlib" in refused(capsys, "show", paths["wiki"], "--out", paths["out"])
