# SPDX-License-Identifier: Apache-2.0
"""`uncomp votes`: a profile as published tables and back, published votes in both forms, bad input in one line."""

from __future__ import annotations

import json
import re

import pytest
from support import published_folder
from test_profile import made

from uncomp import cli
from uncomp.calibration.votes import Votes


def call(capsys, *arguments):
    """(status, stdout, stderr)"""
    try:
        status = cli.main(["votes", *map(str, arguments)])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_profile_becomes_tables_and_votes(tmp_path, capsys, rows, groups):
    """All three say the same groups, those of the profile; the tables have a row a sample."""
    profile, path = made(), tmp_path / "p.json"
    profile.save(path)
    wanted = [profile.groups(layer, groups, rows) for layer in range(profile.model.L)]
    seen = []
    for out, options in (("votes.json", ()), ("tables", ())):
        status, printed, err = call(
            capsys, path, "--groups", groups, "--rows", rows, "--out", tmp_path / out, "--json", *options
        )
        assert (status, err) == (0, "")
        seen.append(json.loads(printed)["group_ids"])
        status, printed, err = call(capsys, tmp_path / out, "--json")
        assert (status, err) == (0, "")
        seen.append(json.loads(printed)["group_ids"])
        assert json.loads(printed)["samples"] == [profile.run.samples] * profile.model.L
    assert seen == [wanted] * 4
    assert Votes.load(tmp_path / "tables").votes == Votes.load(tmp_path / "votes.json").votes
    lines = (tmp_path / "tables/head_type_search_layer0.csv").read_text().splitlines()
    assert len(lines) == profile.run.samples
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "tables", "votes.json"]


def test_published_tables_are_shown(capsys):
    path = published_folder() / "votes/llama2-chat__5_groups__svd32.json"
    status, printed, err = call(capsys, path)
    assert (status, err) == (0, "")
    lines = printed.splitlines()
    assert lines[0].startswith("32 layers of 32 rows, 5 groups")
    ids = [int(text) for text in lines[16].split()[2:]]
    assert [head for head in range(32) if ids[head] == 0] == [1, 2, 8, 9, 13, 22, 23]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("none.json",), 'source ".*none.json" does not exist'),
        (("p.json",), "--groups must lie in .1, .*, the query_head rows of a layer; got None"),
        (
            ("p.json", "--groups", "9", "--rows", "kv_head"),
            "the kv_head rows of a layer; got 9",
        ),
        (("votes.json", "--groups", "2"), "--groups must be left out for votes, which say theirs; got 2"),
        (("cut.json",), "is not a whole JSON file"),
        (("folder",), "must hold head_type_search_layer0.csv; it is missing"),
        (("votes.json", "--out", "nowhere/v.json"), "lies in no folder that exists"),
        (("votes.json", "--out", "folder.json"), "is a folder; a file was wanted"),
        (("votes.json", "--out", "cut.txt"), "must be NAME.json or a folder; it is a file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    made().save("p.json")
    Votes([[[1, 0], [0, 1]]]).save("votes.json")
    (tmp_path / "cut.json").write_text('{"votes": [')
    (tmp_path / "cut.txt").write_text("")
    for name in ("folder", "folder.json"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.rglob("*"))
    status, printed, err = call(capsys, *arguments)
    assert (status, printed, err.count("\n")) == (2, "", 1), err
    assert err.startswith("uncomp")
    assert re.search(line, err), err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    from uncomp.calibration import votes

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(votes.os, "replace", full)
    for name, save in (("v.json", "save"), ("tables", "save_tables")):
        with pytest.raises(OSError, match=rf'^uncomp\.calibration: ".*{name}" cannot be written \(No space left'):
            getattr(Votes([[[1, 0], [0, 1]]] * 2), save)(tmp_path / name)
    assert [p.name for p in tmp_path.rglob("*")] == ["tables"]
