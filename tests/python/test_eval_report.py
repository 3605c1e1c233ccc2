# SPDX-License-Identifier: Apache-2.0
"""Tables compare only what may be compared, with stored tokens beside scores and intervals at differences."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import shutil

import pytest

from uncomp import cli, cli_report
from uncomp.eval.bootstrap import interval


# ---- intervals
def test_interval_of_values_that_are_all_equal():
    assert interval([[2.0, 2.0], [4.0]], seed=0) == (3.0, 3.0)


def test_interval_is_that_of_a_mean():
    """About 1.96 standard errors on both sides; subsets weigh the same whatever their size."""
    draw = random.Random(0)
    values = [draw.gauss(5, 2) for _ in range(400)]
    low, high = interval([values], seed=1)
    mean = sum(values) / 400
    error = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / 400) / 20
    assert low == pytest.approx(mean - error, abs=0.03) and high == pytest.approx(mean + error, abs=0.03)
    pair = interval([values, [7.0]], seed=1)
    assert pair == pytest.approx(((low + 7) / 2, (high + 7) / 2), abs=0.02)
    assert interval([values], seed=1) == (low, high) != interval([values], seed=2)


def test_interval_refuses_nothing_to_draw_from():
    for bad in ([], [[1.0], []]):
        with pytest.raises(ValueError, match=r"^uncomp.eval: interval needs subsets"):
            interval(bad, seed=0)


# ---- made-up runs
def write(folder, policy, budget, hits, *, stored=40.0, task="needle", mode="aware", seed=42, cache=None, **config):
    """A finished run: hits are the scores of its records, in two subsets."""
    path = folder / f"{policy}-{budget}-{mode}".replace(":", "_").replace("=", "_").replace(",", "_")
    path.mkdir(parents=True)
    shared = {"task": task, "model": "m", "dtype": "float32", "mode": mode, **config}
    config = {**shared, "cache": {"decode": "evict", "seed": seed, **(cache or {})}}
    about = {"config": config, "model": "tiny", "device": "cpu", "options": {"window": None, **(cache or {})}}
    (path / "run.json").write_text(json.dumps(about))
    summary = {"task": task, "policy": policy, "budget": budget, "mode": mode, "window": 8, "pool": "max 7"}
    share = 1.0 if budget is None else stored / 400
    summary |= {"total": {"stored": {"share": share}}}
    (path / "summary.json").write_text(json.dumps(summary))
    lines = []
    for i, value in enumerate(hits):
        lines.append({
            "subset": "ab"[i % 2], "id": str(i), "index": i, "new_tokens": 3, "prompt_tokens": 398,
            "score": {"hit": value, "rouge1": value / 2},
            "stored": {"mean": stored, "end": stored}, "bytes": {"kv": 2**20, "allocated": 2**21, "full": 2**23},
            "seconds": {"prefill": 0.5, "decode": 0.25}, "warmup": i == 0, "uncompressed": False,
            "details": {"length": 500 + 100 * (i % 3), "depth": 50 * (i // 3)},
            "evicted_answer": 0.25, "head_consensus": 0.5,
        })  # fmt: skip
    (path / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def report(folder, capsys, *options):
    """(tables, Markdown, CSV rows, stderr)"""
    out = folder / "out"
    assert cli.main(["report", str(folder / "runs"), "--out", str(out), *options, "--json"]) == 0
    printed, err = capsys.readouterr()
    tables = json.loads(printed)
    assert tables == json.loads((out / "report.json").read_text())
    return (
        tables,
        (out / "report.md").read_text(),
        list(csv.DictReader(io.StringIO((out / "report.csv").read_text()))),
        err,
    )


@pytest.fixture(autouse=True)
def drawing(request, monkeypatch):
    """Only tests of figures draw them: that takes longer than all the rest."""
    if "figures" not in request.node.name and "matplotlib" not in request.node.name:
        monkeypatch.setattr(cli_report, "_draw", lambda made: {})


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    write(folder, "full", None, [1.0] * 6, stored=400.0)
    write(folder, "uncomp", 40, [1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    write(folder, "snapkv", 40, [1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    write(folder, "adakv", 40, [1.0] * 6, stored=41.0)
    for seed, last in ((1, 0.0), (2, 1.0)):
        write(folder, f"uncomp:order=random,seed={seed}", 40, [0.0, 0.0, 0.0, 0.0, 0.0, last], seed=seed)
    return tmp_path


def rows(table):
    return {row["policy"]: row for row in table["rows"]}


def test_scores_and_differences(runs, capsys):
    ((table,), text, lines, _) = report(runs, capsys)
    found = rows(table)
    assert list(found) == ["full", "snapkv", "adakv", "uncomp", "uncomp:order=random"]
    assert (table["records"], table["records_not_in_all"]) == (6, 0)
    assert found["uncomp"]["score"] == pytest.approx(500 / 6)
    assert found["uncomp"]["subsets"] == {"a": 100.0, "b": pytest.approx(200 / 3)}
    assert found["snapkv"]["to_uncomp"][0] == pytest.approx(found["snapkv"]["score"] - found["uncomp"]["score"])
    assert found["uncomp"]["to_full"][0] == pytest.approx(-100 / 6) and found["full"]["to_full"] is None
    assert found["uncomp"]["to_uncomp"] is None
    assert found["uncomp"]["metrics"] == {"hit": pytest.approx(500 / 6), "rouge1": pytest.approx(250 / 6)}
    assert "| to uncomp | rouge1 | stored |" in text and "| 41.67 |" in text
    assert found["uncomp"]["share"] == 0.1 and found["uncomp"]["tokens_per_second"] == pytest.approx(8.0)
    cells = {(line["policy"], line["subset"]): line for line in lines}
    assert float(cells["uncomp", "all"]["score"]) == pytest.approx(500 / 6)
    assert float(cells["uncomp", "b"]["score"]) == pytest.approx(200 / 3)
    assert "| uncomp | 40 |" in text and "| \u2013 |" in text


def test_seeds_are_one_row_with_their_spread(runs, capsys):
    ((table,), text, _, _) = report(runs, capsys)
    row = rows(table)["uncomp:order=random"]
    assert row["runs"] == 2 and row["score"] == pytest.approx(100 / 12)
    assert row["score_spread"] == pytest.approx(math.sqrt(2) * 100 / 12)
    assert f"{100 / 12:.2f} ± {math.sqrt(2) * 100 / 12:.2f}" in text
    assert "random groups are as good" not in text


def test_no_winner_where_stored_tokens_differ(runs, capsys):
    """adakv stores 2.5 % more than uncomp: it is marked, and its better score is not the best."""
    ((table,), text, _, _) = report(runs, capsys)
    found = rows(table)
    assert not found["adakv"]["equal_stored"] and found["snapkv"]["equal_stored"]
    (line,) = (line for line in text.splitlines() if line.startswith("| adakv"))
    assert "41.0 ≠" in line and "**" not in line
    (line,) = (line for line in text.splitlines() if line.startswith("| uncomp | 40"))
    assert "**83.33**" in line
    assert "no winner is named there" in text


def test_what_was_not_run_is_missing(runs, capsys):
    ((table,), text, _, _) = report(runs, capsys)
    assert table["missing"] == [{"policy": "streaming_llm", "budget": 40}, {"policy": "pyramidkv", "budget": 40}]
    assert "| streaming_llm | 40 | missing |" in text


def test_a_difference_that_is_none_is_called_so(tmp_path, capsys):
    write(tmp_path / "runs", "uncomp", 40, [1.0, 0.0, 1.0, 0.0])
    write(tmp_path / "runs", "uncomp:order=random", 40, [0.0, 1.0, 1.0, 0.0])
    ((table,), text, _, _) = report(tmp_path, capsys)
    assert rows(table)["uncomp:order=random"]["no_difference_to_uncomp"]
    assert "no difference shown (" in text
    assert "Budget 40: random groups are as good as groups by entropy." in text
    assert "| full | | missing |" in text


def test_what_differs_is_another_table(runs, capsys):
    write(runs / "runs", "uncomp", 40, [1.0] * 6, mode="agnostic")
    write(runs / "runs/other", "uncomp", 40, [1.0] * 6, max_prompt=100)
    tables, text, _, _ = report(runs, capsys)
    found = sorted((table["mode"], len(table["rows"])) for table in tables)
    assert found == [("agnostic", 1), ("aware", 1), ("aware", 5)]
    assert text.count("\n## needle") == 3


def test_one_window_for_all_is_another_table(runs, capsys):
    """With the same full cache; not a second seed of the policies' own windows."""
    for policy, hits in (("uncomp", [0.0] * 6), ("snapkv", [1.0] * 6)):
        write(runs / "runs/other", policy, 40, hits, cache={"window": 16})
    tables, text, _, _ = report(runs, capsys)
    assert [(table["one_setting"], len(table["rows"])) for table in tables] == [({"window": 16}, 3), ({}, 5)]
    one, own = map(rows, tables)
    assert (one["uncomp"]["score"], one["snapkv"]["score"], one["full"]["score"]) == (0.0, 100.0, 100.0)
    assert (one["uncomp"]["runs"], own["uncomp"]["runs"]) == (1, 1)
    assert own["uncomp"]["score"] == pytest.approx(500 / 6)
    assert text.count("One setting for all: window 16.") == 1
    write(runs / "runs/other", "full", None, [0.0] * 6, stored=400.0, cache={"window": 16})
    assert [rows(table)["full"]["score"] for table in report(runs, capsys)[0]] == [0.0, 100.0]


def test_runs_of_one_row_differ_in_their_seed_alone(runs, capsys):
    path = write(runs / "runs/other", "uncomp", 40, [1.0] * 6, seed=1)
    ((table,), *_) = report(runs, capsys)
    assert rows(table)["uncomp"]["runs"] == 2
    for file, groups in ((runs / "runs/uncomp-40-aware/run.json", 2), (path / "run.json", 8)):
        about = json.loads(file.read_text())
        about["config"]["cache"]["groups"] = groups
        file.write_text(json.dumps(about))
    assert "may differ in their seed alone, to be one row; groups is " in refused(capsys, runs / "runs")


def test_longbench_e_by_length(tmp_path, capsys):
    path = write(tmp_path / "runs", "full", None, [1.0, 0.0, 1.0], task="longbench", settings={"e": True})
    lines = [json.loads(line) for line in (path / "examples.jsonl").read_text().splitlines()]
    for line, bucket in zip(lines, ("0-4k", "0-4k", "8k+"), strict=True):
        line["details"] = {"bucket": bucket}
    (path / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, text, _, _ = report(tmp_path, capsys)
    assert "| full |  | 50.00 (n = 2) | \u2013 (n = 0) | 100.00 (n = 1) |" in text


def test_rows_of_a_table_have_the_same_records(runs, capsys):
    write(runs / "runs", "tova", 40, [1.0] * 4)
    ((table,), text, _, _) = report(runs, capsys)
    assert (table["records"], table["records_not_in_all"]) == (4, 2)
    assert rows(table)["uncomp"]["score"] == 100.0
    assert "2 records are not in all rows and are left out." in text


def test_perplexity_is_better_where_it_is_lower(tmp_path, capsys):
    folder = tmp_path / "runs"
    for policy, budget, loss in (("full", None, 2.0), ("uncomp", 40, 2.1), ("snapkv", 40, 2.3)):
        path = write(folder, policy, budget, [loss, loss], task="perplexity", mode="agnostic")
        lines = [json.loads(line) for line in (path / "examples.jsonl").read_text().splitlines()]
        for line in lines:
            line["subset"], line["score"] = "text", {"loss": loss, "kl": loss - 2, "equal_argmax": 0.5}
            del line["new_tokens"]
            line["seconds"], line["stored"] = 1.0, {"mean": 40.0, "share": 0.1}
        (path / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ((table,), text, _, _) = report(tmp_path, capsys)
    found = rows(table)
    assert found["uncomp"]["score"] == pytest.approx(math.exp(2.1))
    assert found["snapkv"]["to_full"] == pytest.approx([math.exp(0.3)] * 3)
    assert found["uncomp"]["kl"] == pytest.approx(0.1)
    assert f"| {math.exp(0.2):.3f}x ({math.exp(0.2):.3f} to {math.exp(0.2):.3f}) |" in text
    assert f"**{math.exp(2.1):.2f}**" in text and f"**{math.exp(2.3):.2f}**" not in text


# ---- files
def test_figures(runs, capsys):
    pytest.importorskip("matplotlib")
    report(runs, capsys)
    drawn = sorted(path.name for path in (runs / "out").glob("*.png"))
    assert drawn == ["needle-aware-0-map.png", "needle-aware-0-stored.png", "needle-aware-0-tasks-40.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (runs / "out").glob("*.png"))


def test_without_matplotlib(runs, capsys, monkeypatch):
    from uncomp import figures

    def missing():
        raise ImportError("uncomp.figures: a figure needs matplotlib")

    monkeypatch.setattr(figures, "formats", missing)
    *_, err = report(runs, capsys)
    assert err.count("\n") == 1 and err.startswith("uncomp report: no figures were drawn: ")
    assert sorted(path.name for path in (runs / "out").iterdir()) == ["report.csv", "report.json", "report.md"]


def test_a_full_disk_takes_the_whole_report_or_nothing(runs, capsys, monkeypatch):
    """Wherever room ends: no table without its other forms, no figures without tables."""
    pytest.importorskip("matplotlib")
    out = runs / "out"
    monkeypatch.setattr(cli_report, "_draw", lambda made: {"one.png": b"1", "two.png": b"2"})
    sync, room = os.fsync, []

    def full(handle):
        if not room:
            raise OSError(28, os.strerror(28))
        room.pop()
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    for files in range(5):
        room[:] = [None] * files
        assert cli.main(["report", str(runs / "runs"), "--out", str(out)]) == 1
        printed, err = capsys.readouterr()
        assert printed == "" and err.startswith("uncomp report: ") and err.count("\n") == 1 and "No space left" in err
        assert not list(out.iterdir())
    room[:] = [None] * 9
    assert cli.main(["report", str(runs / "runs"), "--out", str(out)]) == 0
    names = ["one.png", "report.csv", "report.json", "report.md", "two.png"]
    assert sorted(path.name for path in out.iterdir()) == names and (out / "two.png").read_bytes() == b"2"
    before = (out / "report.md").read_bytes()
    (out / "report.json").unlink()
    (out / "report.json").mkdir()
    (runs / "runs/snapkv-40-aware/summary.json").unlink()
    assert cli.main(["report", str(runs / "runs"), "--out", str(out)]) == 1
    assert "report.json cannot be written (Is a directory)" in capsys.readouterr().err
    assert (out / "report.md").read_bytes() == before


def test_figures_of_scores_that_are_no_numbers(runs, capsys):
    pytest.importorskip("matplotlib")
    path = runs / "runs/snapkv-40-aware/examples.jsonl"
    path.write_text(path.read_text().replace('"hit": 1.0', '"hit": NaN', 1))
    out = runs / "out"
    assert cli.main(["report", str(runs / "runs"), "--out", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert err.startswith("uncomp report: a figure of needle-aware-0 was not drawn: ") and err.count("\n") == 1
    assert "| snapkv | 40 | nan |" in printed and (out / "report.md").read_text() == printed


def refused(capsys, *options):
    status = cli.main(["report", *map(str, options)])
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    return err


def test_bad_input(runs, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert "no finished run under" in refused(capsys, tmp_path / "nothing")
    assert "is no folder" in refused(capsys, tmp_path / "none")
    (runs / "runs/uncomp-40-aware/examples.jsonl").write_text("")
    assert "holds no record" in refused(capsys, runs / "runs")
    (runs / "runs/uncomp-40-aware/examples.jsonl").write_text("{\n")
    assert "examples.jsonl:1: no JSON" in refused(capsys, runs / "runs")
    for file, content in (("examples", "5"), ("examples", '{"subset": "a", "id": 1}'), ("run", "{}"), ("summary", "7")):
        copy = tmp_path / f"{file}{len(content)}"
        shutil.copytree(runs / "runs/snapkv-40-aware", copy)
        (copy / f"{file}.{'jsonl' if file == 'examples' else 'json'}").write_text(content + "\n")
        wanted = ":1: no record" if content == "5" else "holds no run of uncomp eval, or its files were changed"
        assert wanted in refused(capsys, copy)
        shutil.rmtree(copy)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "run.json").write_text('{"scripts": {}}')
    assert "no finished run under" in refused(capsys, foreign)
    assert f"{foreign} holds no run of uncomp eval" in refused(capsys, foreign, "--stopped")
    (runs / "runs/uncomp-40-aware/summary.json").unlink()
    ((_,), text, _, _) = report(runs, capsys)
    assert "Not finished, so not in a table: " in text and "uncomp-40-aware" in text


DAMAGE = [
    ("seconds", "decode"), ("seconds", "prefill"), ("seconds",), ("prompt_tokens",), ("new_tokens",), ("bytes", "kv"),
    ("stored", "end"), ("stored", "mean"), ("score", "hit"), ("score", "rouge1"), ("details", "depth"), ("details",),
    ("evicted_answer",), ("head_consensus",), ("bytes", "allocated"),
]  # fmt: skip


@pytest.mark.parametrize("where", DAMAGE, ids="-".join)
def test_a_record_with_something_else_in_place_of_a_number(runs, capsys, where):
    path = runs / "runs/uncomp-40-aware/examples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    holder = lines[2] if len(where) == 1 else lines[2][where[0]]
    holder[where[-1]] = "x"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    wanted = f"{path.parent} holds no run of uncomp eval, or its files were changed"
    assert wanted in refused(capsys, runs / "runs", "--out", runs / "out")
    assert not (runs / "out").exists()


@pytest.mark.parametrize(
    ("file", "names", "value"),
    [
        ("run.json", ("config", "weights"), []), ("run.json", ("config", "settings"), "x"),
        ("summary.json", ("budget",), "x"), ("summary.json", ("budget",), []), ("summary.json", ("task",), "gsm8k"),
    ],
)  # fmt: skip
def test_a_run_whose_files_were_changed(runs, capsys, file, names, value):
    path = runs / "runs/uncomp-40-aware" / file
    whole = holder = json.loads(path.read_text())
    for name in names[:-1]:
        holder = holder[name]
    holder[names[-1]] = value
    path.write_text(json.dumps(whole))
    assert "or its files were changed" in refused(capsys, runs / "runs", "--out", runs / "out")


def test_files_that_are_no_json(runs, capsys):
    for file, text in (("run.json", "cannot be read"), ("examples.jsonl", "examples.jsonl:1: no JSON")):
        path = runs / "runs/uncomp-40-aware" / file
        before = path.read_text()
        path.write_text("[" * 100_000)
        assert text in refused(capsys, runs / "runs", "--out", runs / "out")
        path.write_text(before + (before if file == "examples.jsonl" else ""))
    assert "examples.jsonl:7 repeats the record a/0" in refused(capsys, runs / "runs", "--out", runs / "out")


def test_seconds_are_those_of_warm_records(runs, capsys):
    path = runs / "runs/uncomp-40-aware/examples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["seconds"] = {"prefill": 100.0, "decode": 100.0}
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    row = rows(report(runs, capsys)[0][0])["uncomp"]
    assert (row["prefill_seconds"], row["tokens_per_second"]) == (0.5, pytest.approx(8.0))


def test_prompts_that_were_cut_are_counted(runs, capsys):
    for path in (runs / "runs").rglob("examples.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        cut = [{**line, "cut_tokens": 9 * (i < 2)} for i, line in enumerate(lines)]
        path.write_text("\n".join(map(json.dumps, cut)) + "\n")
    ((table,), text, *_) = report(runs, capsys)
    assert table["records_cut"] == 2
    assert "2 prompts were longer than the model takes beside the new tokens and were cut in the middle." in text


def test_models_of_one_shape_have_tables_of_their_own(tmp_path, capsys):
    """A run that does not tell its weights stands beside those of one model, not between two."""
    folder = tmp_path / "runs"
    write(folder, "full", None, [1.0, 1.0], weights="a")
    write(folder, "uncomp", 40, [1.0, 0.0])
    assert len(report(tmp_path, capsys)[0]) == 1
    write(folder, "snapkv", 40, [1.0, 0.0], weights="b")
    assert sorted(list(rows(t)) for t in report(tmp_path, capsys)[0]) == [["full"], ["snapkv"], ["uncomp"]]


def test_a_copy_of_a_run_is_no_second_seed(runs, tmp_path, capsys):
    shutil.copytree(runs / "runs/snapkv-40-aware", tmp_path / "copy")
    err = refused(capsys, runs / "runs", tmp_path / "copy")
    assert "snapkv-40-aware" in err and f"{tmp_path / 'copy'} are one run twice; name one of them" in err


def test_the_share_is_that_of_the_records_in_the_table(runs, capsys):
    """A run may have records that the others lack, or more than its last call asked for."""
    path = runs / "runs/snapkv-40-aware/examples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["id"], lines[0]["prompt_tokens"] = "alone", 9998
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    ((table,), *_) = report(runs, capsys)
    assert table["records"] == 5 and rows(table)["snapkv"]["share"] == pytest.approx(0.1)


# ---- runs that were stopped
def stop(path, policy, budget, records):
    """Makes a finished run one that was killed behind some records, in the middle of the next line."""
    lines = (path / "examples.jsonl").read_text().splitlines()
    for i, line in enumerate(lines):
        lines[i] = json.dumps(json.loads(line) | {"prompt_tokens": 398})
    (path / "part-0.jsonl").write_text("".join(line + "\n" for line in lines[:records]) + '{"subset"')
    for name in ("examples.jsonl", "summary.json"):
        (path / name).unlink()
    about = json.loads((path / "run.json").read_text()) | {"policy": policy, "budget": budget}
    about["config"]["cache"] |= {"window": 8, "pool": "max", "pool_width": 7}
    (path / "run.json").write_text(json.dumps(about))


def test_stopped_runs(runs, capsys):
    """Are named, or with --stopped compared over the records that all have; a run whose few records
    would make the table smaller is left out."""
    for name, records in (("snapkv", 5), ("adakv", 1)):
        stop(runs / f"runs/{name}-40-aware", name, 40, records)
    ((table,), text, _, _) = report(runs, capsys)
    assert list(rows(table)) == ["full", "uncomp", "uncomp:order=random"] and table["records"] == 6
    assert text.count("Not finished, so not in a table:") == 2
    ((table,), text, lines, _) = report(runs, capsys, "--stopped")
    assert list(rows(table)) == ["full", "snapkv", "uncomp", "uncomp:order=random"]
    assert (table["records"], table["records_not_in_all"], table["stopped_runs"]) == (5, 1, 1)
    assert table["records_by_subset"] == {"a": 3, "b": 2} and table["too_few_records"] == ["adakv 40 (1)"]
    assert rows(table)["snapkv"]["score"] == pytest.approx(100 / 3) and rows(table)["snapkv"]["share"] == pytest.approx(
        0.1
    )
    assert "| records | | 3 | 2 | 5 |" in text and "1 runs were stopped before they finished." in text
    assert "Left out, because they were stopped after few records: adakv 40 (1)." in text
    assert {(line["subset"], line["records"]) for line in lines} == {("all", "5"), ("a", "3"), ("b", "2")}


def test_stopped_before_the_first_record(runs, capsys):
    stop(runs / "runs/snapkv-40-aware", "snapkv", 40, 0)
    ((table,), text, _, _) = report(runs, capsys, "--stopped")
    assert "snapkv" not in rows(table) and "Not finished, so not in a table:" in text
