# SPDX-License-Identifier: Apache-2.0
"""Texts by path, and WikiText-2 by its name: from a file at hand, from `datasets`, or one line that says what to do."""

from __future__ import annotations

import sys
import types

import pytest

from uncomp.calibration.texts import WIKITEXT2_FILES, read_texts


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    return tmp_path


@pytest.mark.parametrize("name", WIKITEXT2_FILES)
def test_a_file_at_hand(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(" \n = A = \n")
    (folder / "b.txt").write_text("b")
    assert read_texts(["wikitext2", "b.txt"]) == [" \n = A = \n", "b"]


def test_a_file_of_that_name_is_a_file(folder):
    (folder / "wikitext2").write_text("mine")
    assert read_texts(["wikitext2"]) == ["mine"]


def test_through_datasets(monkeypatch):
    """Its lines give the text of the file, whose blank lines it empties."""
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return {"text": ["", " = A = \n", "", " Words . \n"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_texts(["wikitext2"]) == [" \n = A = \n \n Words . \n"]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train")]


def test_without_either():
    with pytest.raises(ValueError, match=r"^uncomp\.calibrate: text wikitext2 is not here: none of the files wiki"):
        read_texts(["wikitext2"])


def test_without_the_network(monkeypatch):
    def load_dataset(*names, split):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"text wikitext2 could not be had through datasets \(no route\)$"):
        read_texts(["wikitext2"])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("none.txt", "cannot be read .No such file"),
        (".", "cannot be read .Is a directory"),
        ("a\0b", "cannot be read .embedded null"),
        ("latin.txt", "is not UTF-8 .byte 3"),
        ("empty.txt", "is empty"),
    ],
)
def test_bad_files(folder, name, line):
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=rf'^uncomp\.calibrate: text "[^"]*" {line}'):
        read_texts([name])
