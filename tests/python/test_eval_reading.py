# SPDX-License-Identifier: Apache-2.0
"""Bad data is told by file and line before anything runs; nothing else is lost."""

from __future__ import annotations

import hashlib
import json

import pytest

from uncomp.eval.reading import BadLine, Reader, are_strings, is_text

FIELDS = {"context": is_text, "answers": are_strings}
GOOD = {"context": "a", "answers": ["b"]}


def lines(path, *values):
    path.write_bytes(b"\n".join(v if isinstance(v, bytes) else json.dumps(v).encode() for v in values) + b"\n")
    return path


def test_reads_and_hashes(tmp_path):
    path = lines(tmp_path / "t.jsonl", GOOD, b"", {**GOOD, "context": "c"})
    reader = Reader()
    assert [(n, r["context"]) for n, r in reader.lines(path, FIELDS)] == [(1, "a"), (3, "c")]
    assert reader.sha256 == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}


BAD = [
    (b'{"context": ', "no JSON"),
    (b'{"length": ' + b"9" * 5000 + b"}", "no JSON \\(Exceeds the limit"),
    (b'{"context": "a \\ud800"}', "no JSON \\(half a surrogate pair"),
    (b"[1]", "must be a JSON object; got list"),
    (b'{"context": "\xff"}', "not UTF-8"),
    ({**GOOD, "answers": None}, "field 'answers' must be a non-empty list of strings; got null"),
    ({**GOOD, "answers": []}, "field 'answers' must be a non-empty list of strings; got \\[\\]"),
    ({**GOOD, "answers": ["a", 1]}, "field 'answers' must be a non-empty list of strings"),
    ({**GOOD, "context": " "}, "field 'context' must be a non-empty string"),
    ({"answers": ["b"]}, "field 'context' must be a non-empty string; got no such field"),
    ({**GOOD, "_id": "x"}, "field '_id' repeats that of line 1: \"x\""),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=range(len(BAD)))
def test_a_bad_line(tmp_path, bad, text):
    path = lines(tmp_path / "t.jsonl", {**GOOD, "_id": "x"}, bad, {**GOOD, "_id": "y"})
    with pytest.raises(BadLine, match=rf"^uncomp eval: \S+/t.jsonl:2: {text}"):
        list(Reader().lines(path, FIELDS, identity="_id"))
    told = []
    reader = Reader(skip_bad=True, on_skip=told.append)
    assert [n for n, _ in reader.lines(path, FIELDS, identity="_id")] == [1, 3]
    assert told == reader.skipped and len(told) == 1


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"^uncomp eval: \S+/none.jsonl cannot be read \(No such file"):
        list(Reader().lines(tmp_path / "none.jsonl", FIELDS))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"^uncomp eval: \S+/empty.jsonl holds no record"):
        list(Reader().lines(tmp_path / "empty.jsonl", FIELDS))


def test_one_json_value(tmp_path):
    (tmp_path / "a.json").write_text('{\n"a": }')
    with pytest.raises(ValueError, match=r"^uncomp eval: \S+/a.json:2: no JSON"):
        Reader().json(tmp_path / "a.json", dict)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must hold a JSON dict; got list"):
        Reader().json(tmp_path / "a.json", dict)
