# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness without a GPU: statistics, plan, rows, table, arguments, registry."""

import json
import sys
from pathlib import Path

import pytest
import torch

from uncomp import _extension

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import cpu
import harness
import report
import run

SHARED = {
    "device": "a device",
    "commit": "abc",
    "torch": "2",
    "cuda": "13",
    "copy_bandwidth_tb_s": 4.0,
    "read_bandwidth_tb_s": 4.2,
}


def a_case(**rivals):
    return harness.Case("gather_tokens", "8x4", "bfloat16", 4_000_000, lambda i: lambda: None, rivals)


# ---- statistics
@pytest.mark.parametrize(
    ("values", "share", "want"),
    [([3.0], 0.5, 3.0), ([4, 1, 3, 2], 0.5, 2.5), (range(11), 0.1, 1.0), (range(11), 0.9, 9.0), ([1, 2], 1, 2)],
)
def test_percentile(values, share, want):
    assert harness.percentile(list(values), share) == want


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.5)])
def test_percentile_refuses(values, share):
    with pytest.raises(ValueError, match="needs values and a share in"):
        harness.percentile(values, share)


@pytest.mark.parametrize(("moved", "want"), [(0, 64), (1, 64), (60 << 20, 4), (12 << 20, 15), (1 << 30, 4)])
def test_sets_exceed_the_cache(moved, want):
    assert harness.wanted_sets(moved, 60 << 20) == want


@pytest.mark.parametrize(("call_ms", "want"), [(0.003, 64), (10, 16), (90, 1), (5000, 1)])
def test_slow_calls_get_fewer_sets(call_ms, want):
    assert harness.affordable_sets(64, call_ms, harness.Plan()) == want


@pytest.mark.parametrize(
    ("replay_ms", "want"), [(0.1, (5, 20)), (5, (5, 20)), (10, (2, 20)), (100, (1, 5)), (2000, (1, 3))]
)
def test_slow_calls_get_fewer_replays_then_fewer_groups(replay_ms, want):
    assert harness.replays_and_groups(replay_ms, harness.Plan()) == want


# ---- rows and table
def test_row_holds_all_that_a_number_needs():
    row = run.make_row(
        a_case(),
        harness.Timing(2.0, 1.9, 2.2, False, 64),
        {"torch": harness.Timing(8.0, 7.0, 9.0, True, 64), "other": harness.Timing(error="RuntimeError: no")},
        SHARED,
    )
    assert set(row) >= {*SHARED, "op", "shape", "dtype", "bytes", "median_us", "spread_us", "sets", "copy_share"}
    assert row["copy_share"] == pytest.approx(0.5)
    assert row["spread_us"] == pytest.approx(0.3)
    assert [(r["name"], r["median_us"], r["eager"]) for r in row["rivals"]] == [
        ("torch", 8.0, True),
        ("other", None, False),
    ]
    assert row["rivals"][1]["error"] == "RuntimeError: no"
    assert json.loads(json.dumps(row)) == row
    assert run.best_rival(row)["name"] == "torch"


def test_table_shows_the_best_rival_and_every_error():
    fast, slow = harness.Timing(4.0, 4.0, 4.0), harness.Timing(9.0, 9.0, 9.0, eager=True)
    broken = harness.Timing(error="ValueError: broken")
    rows = [
        run.make_row(a_case(), fast, {"slow": slow, "broken": broken}, SHARED),
        run.make_row(a_case(), broken, {"slow": slow}, SHARED),
        run.make_row(a_case(), fast, {}, SHARED),
    ]
    lines = run.table(rows).splitlines()
    assert lines[0].split()[:4] == ["op", "shape", "dtype", "us"]
    assert lines[1].split()[-4:] == ["slow", "(eager)", "9.00", "2.25x"]
    assert "error" in lines[2]
    assert lines[4:] == [
        "gather_tokens 8x4, rival broken: ValueError: broken",
        "gather_tokens 8x4 bfloat16: ValueError: broken",
    ]


def test_report_marks_targets_that_are_met():
    def row(op, shape, us, *rivals):
        case = harness.Case(op, shape, "bfloat16", 4_000_000, lambda i: lambda: None)
        return run.make_row(case, harness.Timing(us, us, us), dict(rivals), SHARED)

    uneven = "one row 8x the others, 8x32768 mean"
    rows = [
        row("decode_attention", "8x32768", 40.0, ("cudnn", harness.Timing(38.6, 38, 39))),
        row("decode_attention", uneven, 41.9),
        row("compact_kv", "8x1552 of 32768", 5.04),
        run.make_row(a_case(), harness.Timing(error="ValueError: broken"), {}, SHARED),
    ]
    lines = report.markdown(rows).splitlines()
    assert lines[2] == "| `decode_attention` | 8x32768 | 40.0 | 0.0 | 36 | 2% | cudnn | 38.6 |"
    assert lines[3].startswith(f"| `decode_attention` | {uneven} | **41.9** | 0.0 | 42 |")
    assert "| **5.0** |" in lines[4]
    assert "| error |" in lines[5]


def test_report_compares_with_the_rivals_that_are_to_be_beaten():
    row = {"op": "append_kv_", "shape": "8 rows, T 1", "median_us": 2.0}
    for slower, text in ((6.0, "**3**"), (5.8, "2.9")):
        rivals = [{"name": "index_copy_", "median_us": slower}, {"name": "torch.compile", "median_us": 1.0}]
        lines = report.factors([{**row, "rivals": rivals}]).splitlines()
        assert lines[2:] == [f"| `append_kv_` | 8 rows, T 1 | index_copy_ | {slower} | {text} | 3 |"]
    assert len(report.factors([{**row, "rivals": []}]).splitlines()) == 2


@pytest.mark.parametrize("content", [None, "{", '{"a": 1}', "[1]"])
def test_report_refuses_what_is_no_list_of_rows(tmp_path, capsys, content):
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit):
        report.main([str(path)])
    assert str(path) in capsys.readouterr().err


def test_cpu_refuses_before_it_times_anything(tmp_path, capsys):
    for wrong in (["--json", str(tmp_path / "none" / "rows.json")], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            cpu.main(wrong)
        assert wrong[0] in capsys.readouterr().err


def test_report_has_tables_of_whole_models(tmp_path, capsys):
    rows = [{"what": "decode", "engine": "stock", "batch": 2, "ms_per_step": 1.25, "tokens_per_second": 1600.0}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    assert report.main([str(file)]) == 0
    assert "| stock | 2 | 1.250 | 1600 |" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("key", [*report.TARGETS, *report.RELATIVE, *dict.fromkeys(key[:2] for key in report.FACTORS)])
def test_every_target_belongs_to_a_case(key):
    op, shape = key
    assert shape in [case.shape for case in run.load_cases(run.registry()[op])]


def test_a_resettable_call_is_a_call():
    seen = []
    step = harness.Resettable(lambda: seen.append(1), seen.clear)
    step()
    assert seen == [1]
    step.reset()
    assert seen == []


def test_commit_comes_from_the_environment_first(monkeypatch):
    monkeypatch.setenv("UNCOMP_COMMIT", "1234")
    assert run.commit() == "1234"


# ---- arguments
def test_unknown_op_is_an_argument_error_that_lists_the_known(capsys):
    with pytest.raises(SystemExit) as stop:
        run.parse(["--ops", "no_such_op"])
    assert stop.value.code == 2
    assert "no bench file for 'no_such_op'; there is one for" in capsys.readouterr().err


def test_all_ops_are_the_default():
    assert run.parse([]).ops == list(run.registry())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_one_line_and_exit_2(capsys):
    assert run.main(["--ops", "gather_tokens"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(("keep", "want"), [("all", [1, 2, 0]), ("first", [1, 1, 0]), ("none", [0, 1, 0])])
def test_compile_is_a_rival_of_all_of_the_first_or_of_no_case(keep, want):
    def make(i):
        return lambda: None

    cases = [a_case(**{"torch.compile": make}), a_case(**{"torch.compile": make, "sort": make}), a_case()]
    assert [len(case.rivals) for case in run.without_compile(cases, keep)] == want


# ---- registry
def test_every_bench_file_belongs_to_an_operator():
    files = {path for folder in ("kernels", "layer") for path in (run.BENCHMARKS / folder).glob("*.py")}
    assert files == set(run.registry().values())


@pytest.mark.parametrize("op", sorted(run.registry()))
def test_cases_are_listed_without_a_gpu(op):
    cases = run.load_cases(run.registry()[op])
    assert cases
    for case in cases:
        assert case.op == op
        assert op in _extension.op_names() or run.registry()[op].parent.name == "layer"
        assert case.bytes > 0
        assert callable(case.ours)
        assert all(callable(rival) for rival in case.rivals.values())
    assert len({(case.op, case.shape, case.dtype) for case in cases}) == len(cases)


# ---- CPU
def test_cpu_cases_are_listed_and_differ():
    entries = cpu.entries()
    assert {entry.op for entry in entries} == {"decode_attention", "decode_evict_", "window_scores", "seed_votes_"}
    assert len({(entry.op, entry.shape, entry.dtype) for entry in entries}) == len(entries)


def test_cpu_calls_take_turns():
    seen = []
    times = cpu.interleave({"ours": lambda: seen.append(0), "a": lambda: seen.append(1)}, 0.0)
    assert seen == [0, 1, 0, 1, 1, 0, 0, 1]
    assert [len(t) for t in times.values()] == [cpu.ROUNDS[0]] * 2


@pytest.mark.parametrize("op", ["decode_attention", "decode_evict_", "window_scores", "seed_votes_"])
def test_cpu_small_cases_run(op, monkeypatch, tmp_path, capsys):
    small = {
        "decode_attention": cpu.decode_attention("B 1, 8x9", [9] * 8, 1, torch.bfloat16),
        "decode_evict_": cpu.decode_evict("B 2, 8x20", [20] * 16, 2, torch.float32),
        "window_scores": cpu.window_scores(40, 8, torch.bfloat16),
        "seed_votes_": cpu.seed_votes("8x9", [9] * 8, 8, torch.float32),
    }
    monkeypatch.setattr(cpu, "entries", lambda: list(small.values()))
    before = torch.get_num_threads()
    try:
        assert cpu.main(["--ops", op, "--threads", "1", "--seconds", "0", "--json", str(tmp_path / "rows.json")]) == 0
    finally:
        torch.set_num_threads(before)
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert set(row) >= {"op", "shape", "dtype", "device", "threads", "commit", "median_us", "spread_us", "rivals"}
    assert all(rival["median_us"] > 0 for rival in row["rivals"])
    assert row["rivals"][0]["name"] in capsys.readouterr().out
