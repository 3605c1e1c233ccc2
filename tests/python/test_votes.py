# SPDX-License-Identifier: Apache-2.0
"""calibration.votes: published tables give the published votes and orders; what is written is read back; a broken file
is refused by name."""

import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import published_folder, published_votes

from uncomp import grouping
from uncomp.calibration import votes as module
from uncomp.calibration.votes import Votes

PUBLISHED_CSV = ["llama3-instruct__2_groups__svd32", "llama3-instruct__8_groups__svd32"]


def small() -> Votes:
    return Votes([[[3, 1, 0], [0, 2, 2], [1, 1, 2]], [[4, 0, 0], [0, 4, 0], [0, 0, 4]]], "a test")


# ---- values
@pytest.mark.parametrize("name", PUBLISHED_CSV)
@pytest.mark.parametrize("layer", [0, 15, 31])
def test_published_tables_have_the_published_votes(name, layer):
    table = module.read_table(published_folder() / "raw_csv" / name / module.TABLE.format(layer))
    assert (len(table), len(table[0])) == (500, 32)
    assert module.count_votes(table) == published_votes(name)[layer]


def test_published_tables_give_the_published_orders():
    made = Votes.load(published_folder() / "votes/llama3-instruct__8_groups__svd32.json")
    table = module.read_table(published_folder() / "raw_csv/llama3-instruct__8_groups__svd32" / module.TABLE.format(0))
    groups = grouping.groups_from_labels(module.count_votes(table, 8))
    assert groups[0] == [1, 3, 7, 24] and groups[7] == [11, 15, 20, 21]
    assert made.group_ids()[0] == grouping.group_ids(groups)


@pytest.mark.parametrize(
    ("name", "whole"),
    [("llama3-instruct__2_groups__svd32", 74), ("512__mistral__query", 62)],
    ids=["llama3", "mistral"],
)
def test_kv_heads_whose_query_heads_stand_in_one_half(name, whole):
    ids = Votes.load(published_folder() / "votes" / f"{name}.json").group_ids()
    assert sum(len(set(layer[i : i + 4])) == 1 for layer in ids for i in range(0, 32, 4)) == whole


def test_every_published_file_is_read_and_written_back(tmp_path):
    for path in sorted((published_folder() / "votes").glob("*.json")):
        made = Votes.load(path)
        made.save(tmp_path / "again.json")
        assert json.loads((tmp_path / "again.json").read_text()) == json.loads(path.read_text())
        for layer, ids in zip(made.votes, made.group_ids(), strict=True):
            sizes = [ids.count(g) for g in range(len(layer[0]))]
            if "delete" in path.name:
                assert sizes[0] == int(path.stem.rsplit("_", 1)[1])
            else:
                assert sizes == grouping.group_sizes(len(layer), len(layer[0]))


@pytest.mark.parametrize("name", ["llama2-chat__5_groups__svd32", "512__llama2-chat__variance"])
def test_tables_made_from_published_votes(name):
    for layer in published_votes(name)[::10]:
        table = module.table_from_votes(layer)
        assert module.count_votes(table, len(layer[0])) == layer
        for label, total in enumerate(map(sum, zip(*layer, strict=True))):
            low, high = total // len(table), -(-total // len(table))
            assert all(low <= row.count(label) <= high for row in table)


def test_votes_files_and_tables_give_the_same(tmp_path):
    small().save(tmp_path / "votes.json")
    small().save_tables(tmp_path / "tables")
    assert sorted(os.listdir(tmp_path / "tables")) == ["head_type_search_layer0.csv", "head_type_search_layer1.csv"]
    assert (tmp_path / "tables/head_type_search_layer1.csv").read_bytes() == b"0,1,2\r\n" * 4
    assert Votes.load(tmp_path / "votes.json") == small()
    assert Votes.load(tmp_path / "tables") == Votes(small().votes, "tables")
    assert small().samples == [4, 4] and small().group_ids() == [[0, 1, 2], [0, 1, 2]]


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = [[0, 1, 2], [2, 0, 1]]
    module.write_table(tmp_path / "t.csv", table)
    assert module.read_table(tmp_path / "t.csv") == table
    (tmp_path / "u.csv").write_bytes(b"\xef\xbb\xbf0, 1,2\n\n2,0,1")  # a mark at the front, spaces, no last line end
    assert module.read_table(tmp_path / "u.csv") == table
    assert os.listdir(tmp_path).count("t.csv") == len(os.listdir(tmp_path)) - 1


# ---- edges
@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.data())
def test_a_table_has_the_votes_and_group_sizes_it_was_made_from(heads, samples, data):
    num_groups = data.draw(st.integers(1, heads))
    rng, labels = random.Random(data.draw(st.integers(0, 999))), grouping.labels(heads, num_groups)
    drawn = [rng.sample(labels, heads) for _ in range(samples)]
    votes = module.count_votes(drawn, num_groups)
    table = module.table_from_votes(votes)
    assert module.count_votes(table, num_groups) == votes
    assert all(sorted(row) == labels for row in table)


def test_a_large_layer_is_made_within_seconds():
    rng, ranks = random.Random(1), list(range(64))
    drawn = [rng.sample(ranks, 64) for _ in range(500)]
    table = module.table_from_votes(module.count_votes(drawn, 64))
    assert all(sorted(row) == ranks for row in table) and len(table) == 500


# ---- errors
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "must hold at least one row"),
        (b"0,1\n1\n", "must have 2 columns in every row; line 2 has 1"),
        (b"0,1\n1,x\n", "must hold group ids, whole numbers from 0; got 'x' in line 2"),
        (b"0,-1\n", "got '-1' in line 1"),
        (b"0,\xff\n", "must be a CSV file in UTF-8"),
    ],
)
def test_broken_tables(tmp_path, content, text):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^uncomp.calibration: .*t.csv .*{text}|^uncomp.calibration: .*t.csv {text}"):
        module.read_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "is not a whole JSON file"),
        ('{"votes": [[[1', "is not a whole JSON file"),
        ("[1]", "it has no list named votes"),
        ('{"votes": []}', r"votes must be \[L\]\[H\]\[G\]"),
        ('{"votes": [1]}', r"votes must be \[layers\]\[heads\]\[labels\]"),
        ('{"votes": [[[1, 0], [1]]]}', r"votes must be \[L\]\[H\]\[G\]"),
        ('{"votes": [[[1, 0], [1, 1]]]}', "votes of layer 0 must be whole numbers, for every head one vote a sample"),
        ('{"votes": [[[1.5, 0], [1, 0]]]}', "votes of layer 0 must be whole numbers"),
        ('{"votes": [[[1, 0], [0, 1]]], "layers": 2}', "must hold what it says"),
    ],
)
def test_broken_votes(tmp_path, content, text):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^uncomp.calibration: .*{text}") as caught:
        Votes.load(tmp_path / "v.json")
    assert "v.json" in str(caught.value)


def test_other_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold head_type_search_layer0\.csv; it is missing"):
        Votes.load(tmp_path)
    module.write_table(tmp_path / module.TABLE.format(1), [[0]])
    with pytest.raises(FileNotFoundError, match=r"layer0\.csv"):
        Votes.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Votes.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"table must hold labels from 0 to 1; got 2"):
        module.count_votes([[0, 2]], 2)
    with pytest.raises(ValueError, match=r"table must be \[samples\]\[H\] with one H"):
        module.count_votes([])
    with pytest.raises(ValueError, match=r"votes must be \[H\]\[G\] with one vote a sample for every head"):
        module.table_from_votes([[1, 0], [1, 1]])
    with pytest.raises(OSError):
        small().save(tmp_path / "none" / "v.json")
