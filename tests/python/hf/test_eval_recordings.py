# SPDX-License-Identifier: Apache-2.0
"""A run patches the model once and replays one recorded step; the stand-in for CUDA graphs shows it on a CPU."""

from __future__ import annotations

import json
import re
import time

import pytest

pytest.importorskip("transformers")

import eval_support as support
import graph_support
import torch
from eval_support import ran

import uncomp
from uncomp import cli
from uncomp.eval import batch, perplexity, runner
from uncomp.eval.prompts import Prompt
from uncomp.testing import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return support.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recorded(monkeypatch):
    """Patched models record on the CPU."""

    def patch(model, config):
        handle = uncomp.patch(model, config)
        graph_support.ReplayMachine(handle)
        return handle

    for module in (runner, perplexity):
        monkeypatch.setattr(module, "patch", patch)


def steps(summary):
    call = summary["call"]
    return call["patches"], call["steps_recorded"], call["steps_eager"]


def test_a_run_records_once(model, recorded, tmp_path, capsys):
    """For all prompts whose layers are packed alike: in both modes, whose questions are as long in one subset."""
    data = support.make_longbench(tmp_path / "data", records=4)
    modes = ["--question", "aware", "--question", "agnostic"]
    policies = ["--policy", "uncomp", "--policy", "snapkv"]
    for summary in ran(capsys, model, data, tmp_path / "out", "--subset", "qasper", *policies, *modes):
        assert summary["total"]["n"] == summary["call"]["records"] == 4
        # The first step warms up and the second is recorded; replays count what was recorded too.
        assert steps(summary) == (1, 1, 1), summary["mode"]
        assert summary["call"]["steps_replayed"] >= 4 * 5 - 1  # 6 new tokens, the first from the prefill
    plain = ran(capsys, model, data, tmp_path / "plain", "--subset", "qasper", *policies, *modes, "--per-row")
    assert all(summary["call"]["steps_recorded"] == 1 for summary in plain)


def test_recorded_texts_are_those_of_ordinary_steps(model, tmp_path, capsys, monkeypatch):
    data = support.make_longbench(tmp_path / "data", records=3)
    given = ["--policy", "full", "--policy", "uncomp", "--question", "aware", "--question", "agnostic"]
    ran(capsys, model, data, tmp_path / "eager", *given)

    def patch(model, config):
        handle = uncomp.patch(model, config)
        graph_support.ReplayMachine(handle)
        return handle

    monkeypatch.setattr(runner, "patch", patch)
    made = ran(capsys, model, data, tmp_path / "recorded", *given)
    assert all(summary["call"]["steps_replayed"] > 0 for summary in made)
    for path in (tmp_path / "eager/longbench").iterdir():
        assert support.steady(path) == support.steady(tmp_path / "recorded/longbench" / path.name)


def test_windows_of_a_text_share_a_recording(model, recorded, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(support.words(200))
    given = ["--model", str(model), "--data", str(tmp_path / "text.txt"), "--device", "cpu", "--dtype", "float32"]
    given += ["--prefix", "100", "--continuation", "9", "--budget", "40", "--limit", "4", "--json"]
    policies = ["--policy", "full", "--policy", "uncomp", "--policy", "adakv"]
    assert cli.main(["eval", "perplexity", *given, *policies, "--out", str(tmp_path / "a")]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert steps(json.loads(line)) == (1, 1, 1), line


@pytest.mark.parametrize("block", [1, 2])
def test_blocks_of_windows_change_nothing(model, tmp_path, capsys, monkeypatch, block):
    """Windows are scored in blocks of what memory holds, each as if it were alone."""
    from uncomp.eval import continuations

    (tmp_path / "text.txt").write_text(support.words(200))
    given = ["--model", str(model), "--data", str(tmp_path / "text.txt"), "--device", "cpu", "--dtype", "float32"]
    given += ["--prefix", "100", "--continuation", "9", "--budget", "40", "--limit", "4", "--policy", "snapkv"]
    assert cli.main(["eval", "perplexity", *given, "--out", str(tmp_path / "a")]) == 0
    monkeypatch.setattr(continuations, "HELD_BYTES", block * 4 * 260 * 9)
    assert cli.main(["eval", "perplexity", *given, "--out", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["call"]["patches"] == 4 // block
    one, other = (support.records(tmp_path / name / "perplexity/snapkv-40-agnostic") for name in "ab")
    assert [r["warmup"] for r in other] == [i % block == 0 for i in range(4)]  # each block patches the model
    assert [{**r, "seconds": 0, "warmup": 0} for r in one] == [{**r, "seconds": 0, "warmup": 0} for r in other]


def test_a_longer_question_is_recorded_anew():
    """And one that is as long as the last one is not, whatever the length of its context."""
    model = tiny_model("llama")
    draw = torch.Generator().manual_seed(0)
    made = [(150, 9), (110, 9), (131, 9), (120, 12), (99, 12)]
    prompts = [Prompt(torch.randint(3, 199, (n,), generator=draw).tolist(), n - q, 0, []) for n, q in made]
    config = uncomp.UncompConfig(budget=48, extend="append")
    with uncomp.patch(model, config) as handle:
        graph_support.ReplayMachine(handle)
        counts = []
        for prompt in prompts:
            batch.run(model, handle, [prompt], max_new_tokens=5, agnostic=True, pad=0, eos=())
            counts.append(handle.stats()["steps_recorded"])
        assert counts == [1, 1, 1, 2, 2]
        assert len(handle._recordings.graphs) == 1  # the arenas of the shorter question are gone


# ---- rounds
def test_rounds_change_no_record(model, tmp_path, capsys):
    """Agreement with the full cache, which is read between rounds, included; the model is patched once a round."""
    data = support.make_longbench(tmp_path / "data", records=4)
    given = ["--policy", "full", "--policy", "uncomp", "--question", "aware", "--question", "agnostic"]
    ran(capsys, model, data, tmp_path / "one", *given)
    for summary in ran(capsys, model, data, tmp_path / "three", *given, "--rounds", "3"):
        assert (summary["call"]["patches"], summary["call"]["records"]) == (3, 8)
    for path in (tmp_path / "one/longbench").iterdir():
        found = support.steady(path)
        assert found == support.steady(tmp_path / "three/longbench" / path.name)
        assert all("agreement" in record for record in found) == path.name.startswith("uncomp")


def test_a_kill_leaves_shares_that_all_runs_have(model, tmp_path, capsys, monkeypatch):
    from uncomp.eval.folder import RunFolder

    data = support.make_longbench(tmp_path / "data", records=4)
    given = ["--policy", "full", "--policy", "uncomp", "--policy", "snapkv", "--subset", "qasper", "--rounds", "2"]
    before, calls = RunFolder.append, []

    def append(self, rank, records):
        if len(calls) == 8:  # one of three runs has done the second share
            raise KeyboardInterrupt
        calls.append(self.path.name)
        before(self, rank, records)

    monkeypatch.setattr(RunFolder, "append", append)
    assert support.call(capsys, model, data, tmp_path / "out", *given)[0] == 130
    found = {path.parent.name: path.read_text().count("\n") for path in tmp_path.glob("out/longbench/*/part-0.jsonl")}
    assert found == {"full-full-aware": 4, "uncomp-40-aware": 2, "snapkv-40-aware": 2}
    assert cli.main(["report", str(tmp_path / "out"), "--stopped", "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)
    assert (table["records"], table["stopped_runs"], len(table["rows"])) == (2, 2, 3)


def test_where_the_time_went(model, tmp_path, capsys, monkeypatch):
    """One line on stderr, and `call` in every summary; what was interrupted says it too."""
    from uncomp.eval.folder import RunFolder

    data = support.make_longbench(tmp_path / "data", records=2)
    given = ["--policy", "full", "--policy", "uncomp", "--subset", "qasper"]
    status, out, err = support.call(capsys, model, data, tmp_path / "a", *given, "--json")
    assert status == 0
    (line,) = [line for line in err.splitlines() if line.startswith("uncomp eval: 4 records, ")]
    made = [json.loads(each)["call"] for each in out.splitlines()]
    assert all(0 < call["model_seconds"] < call["seconds"] for call in made)
    model_seconds, seconds = (sum(call[name] for call in made) for name in ("model_seconds", "seconds"))
    told = re.search(r"4 records, (\S+) s in the model \(prefill and decode\), (\S+) s beside it", line)
    assert float(told[1]) == pytest.approx(model_seconds, abs=0.06)
    assert float(told[2]) >= seconds - model_seconds - 0.06  # folders and summaries besides

    def stop(self, rank, records):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "append", stop)
    status, _, err = support.call(capsys, model, data, tmp_path / "b", *given)
    assert status == 130 and "uncomp eval: 0 records, " in err


def test_a_batch_that_is_broken_off_was_in_the_model(model, tmp_path, capsys, monkeypatch):
    def late(*args, **kwargs):
        time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "run", late)
    monkeypatch.setattr(perplexity.Probe, "score", late)
    data = support.make_longbench(tmp_path / "data", records=2)
    status, _, err = support.call(capsys, model, data, tmp_path / "b", "--policy", "uncomp", "--subset", "qasper")
    assert status == 130 and "uncomp eval: 0 records, 0.3 s in the model" in err
    (tmp_path / "text.txt").write_text(support.words(150))
    given = ["--model", str(model), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "p")]
    status = cli.main(["eval", "perplexity", *given, "--device", "cpu", "--prefix", "60", "--continuation", "4"])
    assert status == 130 and "uncomp eval: 0 records, 0.3 s in the model" in capsys.readouterr().err


def test_the_full_cache_that_others_are_set_beside_is_the_model_too(model, tmp_path, capsys, monkeypatch):
    scored = []
    before = perplexity.Probe.score

    def score(self, *pieces):
        scored.append(before(self, *pieces))
        return scored[-1]

    monkeypatch.setattr(perplexity.Probe, "score", score)
    (tmp_path / "text.txt").write_text(support.words(150))
    given = ["--model", str(model), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "p"), "--limit", "2"]
    given += ["--device", "cpu", "--prefix", "60", "--continuation", "4", "--budget", "20", "--json"]
    assert cli.main(["eval", "perplexity", *given]) == 0
    call = json.loads(capsys.readouterr().out)["call"]
    assert len(scored) == 4 and (call["records"], call["patches"]) == (2, 1)
    spent = sum(one.prefill_seconds + one.decode_seconds for one in scored)
    assert call["model_seconds"] == pytest.approx(spent, abs=1e-3) and call["seconds"] >= spent
