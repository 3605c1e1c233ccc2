# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark of low rank on a tiny model: its rows, what is shared between them, and their table."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
import graph_support
import lorc_lost
import lorc_page
import lorc_quality
import lorc_table

import uncomp
from uncomp import lorc
from uncomp.eval import perplexity, runner, sample
from uncomp.hf import load
from uncomp.testing import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.hf
NEEDLE = {"needle": "The key is 4711.", "question": "What is the key?", "answer": "4711"}


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Arguments of a run on a tiny model, which takes seconds, without rows."""
    model, tokenizer = tiny_model("llama", vocab_size=260, num_hidden_layers=2), tiny_tokenizer()
    monkeypatch.setattr(load, "load_model", lambda *args, **kwargs: (model, tokenizer))
    (tmp_path / "text.txt").write_text("All that is gold does not glitter. " * 40)
    (tmp_path / "niah/PaulGrahamEssays").mkdir(parents=True)
    (tmp_path / "niah/PaulGrahamEssays/a.txt").write_text("Not all those who wander are lost. " * 40)
    (tmp_path / "niah/needles.json").write_text(json.dumps([NEEDLE]))
    sample.write(tmp_path / "lb", new_tokens=4)
    words = f"""--model tiny --text {tmp_path}/text.txt --calibrate {tmp_path}/text.txt --prefix 200 --continuation 4
        --windows 2 --samples 2 --seqlen 40 --device cpu --json {tmp_path}/rows.json --budget 0.3"""
    answers = f"""--needle {tmp_path}/niah --lengths 500 --depths 50 --longbench {tmp_path}/lb --subsets {sample.TASK}
        --max-prompt 500 --out {tmp_path}/out"""
    return argparse.Namespace(words=words.split(), answers=answers.split(), json=tmp_path / "rows.json", model=model)


def test_pieces_are_spread():
    pieces = lorc_quality.pieces_of(torch.arange(100), 3, 20)
    assert pieces[:, 0].tolist() == [0, 40, 80] and torch.equal(pieces[1], torch.arange(40, 60))


def test_a_row_for_each_kind_of_factors(call, capsys):
    """Whole rank loses nothing; shared rows run alone; bytes are those of ranks times tokens; the model comes back."""
    before = {name: p.clone() for name, p in call.model.named_parameters()}
    grid = ["--rho", "1", "0.5", "--schedules", "uniform", "--granularity", "head", "layer"]
    assert lorc_quality.main([*call.words, *grid]) == 0
    rows = json.loads(call.json.read_text())
    named = [(row["rho"], row.get("factors"), row.get("granularity")) for row in rows]
    assert named == [
        (None, None, None),
        *((rho, kind, grain) for kind in ("whitened", "plain") for grain in ("head", "layer") for rho in (1.0, 0.5)),
    ]
    whole, half = rows[1], rows[2]
    for way in ("full", "uncomp"):
        assert whole[way]["loss"] == pytest.approx(rows[0][way]["loss"], abs=1e-4)
        assert half[way]["loss"] != pytest.approx(rows[0][way]["loss"], abs=1e-4)
        assert half[way]["kv_bytes"] * 2 == whole[way]["kv_bytes"] == rows[0][way]["kv_bytes"]
    assert rows[0]["full"]["stored_tokens"] == 200 and rows[0]["uncomp"]["stored_tokens"] == 60
    assert [("uncomp" in row) for row in rows] == [row.get("granularity") != "layer" for row in rows]
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)
    assert all(torch.equal(p, before[name]) for name, p in call.model.named_parameters())


def test_answers_are_those_of_the_evaluation(call):
    """Needles and records of LongBench, of the model as it is and of whole factors, are the same and left in --out."""
    assert lorc_quality.main([*call.words, *call.answers, "--rho", "1", "--schedules", "uniform"]) == 0
    as_it_is, whitened, plain = json.loads(call.json.read_text())
    for way in ("full", "uncomp"):
        assert as_it_is[way]["needles"] == 1 and len(as_it_is[way]["longbench_records"]) == 2
        assert as_it_is[way]["longbench_subsets"].keys() == {sample.TASK}
        for row in (whitened, plain):
            assert row[way]["longbench_records"] == as_it_is[way]["longbench_records"]
    out = Path(call.answers[-1])
    made = {p.parent.relative_to(out).as_posix() for p in out.glob("*/*/*/examples.jsonl")}
    names = ("as-it-is", "1.0-uniform-whitened-head", "1.0-uniform-plain-head")
    runs = ("full-full-aware", "uncomp-0.3-aware")
    assert made == {f"{name}/{task}/{run}" for name in names for task in ("needle", "longbench") for run in runs}


def test_steps_are_recorded_and_say_the_same(call, monkeypatch):
    """A step for all continuations of a way, in each state of the model; on the CPU the stand-in for CUDA graphs."""
    grid = [*call.words, *call.answers[:-2], "--rho", "0.5", "--schedules", "uniform", "--factors", "whitened"]
    lorc_quality.main(grid)
    plain = json.loads(call.json.read_text())

    def recorded(model, config):
        handle = uncomp.patch(model, config)
        graph_support.ReplayMachine(handle)
        return handle

    for module in (runner, perplexity):
        monkeypatch.setattr(module, "patch", recorded)
    lorc_quality.main(grid)
    rows = json.loads(call.json.read_text())
    assert len(rows) == len(plain) == 2
    for row, other in zip(rows, plain, strict=True):
        for way in ("full", "uncomp"):
            steps = row[way]["perplexity_steps"]
            assert (steps["steps_recorded"], steps["steps_eager"]) == (1, 1)  # the first one warms up
            assert row[way]["losses"] == pytest.approx(other[way]["losses"], abs=1e-5)
            assert row[way]["longbench_records"] == other[way]["longbench_records"]
            assert row[way]["longbench_effort"]["steps_replayed"] > 0


def test_schedules_of_equal_ranks_are_measured_once(call):
    """At whole rank all schedules are one; the rows are there, with the same numbers and their own names."""
    grid = ["--rho", "1", "0.5", "--schedules", "linear", "uniform", "--factors", "plain"]
    lorc_quality.main([*call.words, *grid])
    rows = json.loads(call.json.read_text())[1:]
    named = [(row["rho"], row["schedule"], row.get("same_ranks_as")) for row in rows]
    assert named[:3] == [(1.0, "linear", None), (1.0, "uniform", "linear"), (0.5, "linear", None)]
    assert rows[0]["full"] == rows[1]["full"]
    assert rows[2]["rank_k"] != rows[3]["rank_k"] and rows[3].get("same_ranks_as") is None


def test_calibration_runs_once(call, monkeypatch):
    seen = []
    real = lorc.calibrate
    monkeypatch.setattr(lorc, "calibrate", lambda *args, **fields: seen.append(fields) or real(*args, **fields))
    lorc_quality.main([*call.words, "--rho", "1", "0.5", "--schedules", "uniform", "linear", "--factors", "whitened"])
    assert seen == [{"granularity": "head"}]


def test_shares_are_one_table_again(call, tmp_path, capsys):
    grid = ["--rho", "0.5", "--schedules", "uniform", "--windows", "1"]
    whole, parts = tmp_path / "whole.json", [tmp_path / "2.json", tmp_path / "1.json"]
    lorc_quality.main([*call.words, *grid, "--json", str(whole)])
    for share, path in zip(("2/2", "1/2"), parts, strict=True):
        lorc_quality.main([*call.words, *grid, "--share", share, "--json", str(path)])
    capsys.readouterr()
    assert [len(json.loads(path.read_text())) for path in parts] == [1, 2]
    tables = []
    for paths in ([whole], parts):
        assert lorc_quality.main(["--merge", *map(str, paths)]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and tables[0].count("\n") == 5
    assert "50.0 %" in tables[0].splitlines()[-1]
    with pytest.raises(ValueError, match="must hold a row once; twice: "):
        lorc_quality.main(["--merge", str(whole), str(parts[0])])
    other = [{**row, "device": "another"} for row in json.loads(parts[1].read_text())]
    with pytest.raises(ValueError, match="must share the device; got another, cpu"):
        lorc_table.merged([json.loads(whole.read_text()), other])


def made_rows(worse):
    """Rows as files have them; each nat and point of loss is known."""
    rows = []
    for rho, schedule in ((None, None), (0.5, "uniform"), (0.5, "linear"), (0.75, "linear"), (0.7, "uniform")):
        less = 0 if rho is None else worse[schedule]
        way = {"loss": 2 + less, "perplexity": 7.4, "losses": [1 + less, 3 + less], "kv_bytes": 800, "longbench": 1}
        way["longbench_records"] = {"b/1": 0.8 - less / 10, "b/2": 0.6 - less / 10, "a/1": 1 - less / 10}
        state = {"rho": rho, "schedule": schedule, "factors": "plain", "granularity": "head", "kept_share": rho}
        options = {
            "model": "/private/m.gguf",
            "text": "/private/set/a.txt",
            "needle": "/private/niah",
            "rho": [0.5, 0.7],
        }
        options |= {
            "prefix": 9,
            "continuation": 4,
            "budget": 0.1,
            "batch_size": 6,
            "share": [1, 2],
            "json": "/private/x.json",
        }
        facts = {"model": "/private/m.gguf", "device": "cpu", "dtype": "float32", "commit": "abc", "options": options}
        facts |= {"torch": "2", "transformers": "5"}
        rows.append({**facts, **(state if rho else {"rho": None}), "full": way})
    return rows


def test_losses_are_paired(capsys):
    """Equal differences have an interval of no width; schedules are compared at the shares that both have."""
    rows = made_rows({"uniform": 0.5, "linear": 0.75})
    lines = lorc_lost.lost(rows).splitlines()
    assert lines[0] == "| rho | schedule | factors | loss, nats, full | LongBench, points, full |"
    assert lines[2] == "| 0.5 | uniform | plain | +0.500 (+0.500 to +0.500) | -5.0 (-5.0 to -5.0) |"
    (line,) = lorc_lost.schedules(rows).splitlines()[2:]
    assert line == "| linear | plain | 0.5 | +0.250 (+0.250 to +0.250) | -2.5 (-2.5 to -2.5) |"
    one, other = [[1.0, 5.0], [4.0]], [[1.0, 1.0], [1.0]]
    assert lorc_lost.difference([(one, other)], 1).startswith("+2.5 (+1.5 to +3.5")


def test_a_page_keeps_its_findings_and_names_no_machine(tmp_path):
    paths = [tmp_path / f"{name}.json" for name in "ab"]
    rows = made_rows({"uniform": 0.5, "linear": 0.75})
    for path, some in zip(paths, (rows[1:], rows[:1]), strict=True):
        path.write_text(json.dumps(some))
    out = tmp_path / "page.md"
    for said in ("", "What it says."):
        out.write_text(out.read_text().replace(lorc_page.END, said + lorc_page.END) if out.exists() else "")
        assert lorc_page.main(["--section", "A model", *map(str, paths), "--out", str(out)]) == 0
    text = out.read_text()
    assert "What it says.<!-- /findings -->" in text and "10.00% of the" in text
    call = (
        "--text DATA/set/a.txt --needle DATA/niah --rho 0.5 0.7 --prefix 9 --continuation 4 --budget 0.1 --batch-size 6"
    )
    assert f"python benchmarks/lorc_quality.py --model MODEL {call} A model on cpu" in " ".join(
        text.replace("\\\n", "").split()
    )
    assert "A cell has 2 continuations of 4 tokens behind 9, 3 records of LongBench." in text
    assert "Schedules less uniform ranks" in text and text.count("| 0.5 | linear | plain |") == 2
    assert "private" not in text + out.with_suffix(".json").read_text()
    assert [row["rho"] for row in json.loads(out.with_suffix(".json").read_text())] == [None, 0.75, 0.7, 0.5, 0.5]


def test_nothing_begins_behind_the_deadline(call, monkeypatch):
    """What was measured of a row stays, and says what is missing."""
    now = iter([0.0, *[1.0] * 3, *[99.0] * 9])
    monkeypatch.setattr(lorc_quality, "time", argparse.Namespace(monotonic=lambda: next(now), perf_counter=time.time))
    lorc_quality.main([*call.words, "--deadline", "50"])
    (row,) = json.loads(call.json.read_text())
    assert row["rho"] is None and "loss" in row["full"] and "uncomp" not in row
    assert row["stopped_before"] == "perplexity uncomp"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--text F", "--model or --merge is needed"),
        ("--model M", "there is nothing to measure"),
        ("--model M --text F --share 3/2", "must be I/N, with I from 1 to N; got 3/2"),
    ],
)
def test_bad_arguments(words, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        lorc_quality.main(words.split())
    assert text in capsys.readouterr().err
