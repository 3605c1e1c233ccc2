# SPDX-License-Identifier: Apache-2.0
"""A task from the command line to records and summaries: files, modes, resume, exit statuses."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("transformers")

import eval_support as support
from eval_support import arguments, call, ran, records

from uncomp import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return support.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return support.make_longbench(tmp_path_factory.mktemp("data") / "longbench", records=4)


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """Undisturbed runs of three policies in both modes, one prompt a batch."""
    out = tmp_path_factory.mktemp("finished")
    policies = ["--policy", "uncomp", "--policy", "full", "--policy", "snapkv"]
    assert cli.main(arguments(model, data, out, *policies, "--question", "aware", "--question", "agnostic")) == 0
    return out / "longbench"


# ---- what is written
def test_folders(finished):
    modes = ("aware", "agnostic")
    names = [f"{policy}-{mode}" for policy in ("full-full", "snapkv-40", "uncomp-40") for mode in modes]
    assert sorted(path.name for path in finished.iterdir()) == sorted(names)
    for path in finished.iterdir():
        assert sorted(file.name for file in path.iterdir()) == [
            "examples.jsonl", "part-0.jsonl", "run.json", "summary.json",
        ]  # fmt: skip


def test_records(finished):
    found = records(finished / "uncomp-40-aware")
    assert [(r["subset"], r["id"], r["index"]) for r in found] == [
        *(("qasper", f"qasper{i}", i) for i in range(4)), *(("trec", f"trec{i}", 4 + i) for i in range(4)),
    ]  # fmt: skip
    for record in found:
        assert 1 <= record["new_tokens"] == len(record["tokens"]) <= (6 if record["subset"] == "qasper" else 4)
        assert record["stored"]["mean"] == record["stored"]["end"] == 40
        assert record["bytes"]["kv"] == record["bytes"]["allocated"] == 40 * 2 * 4 * 2 * 16 * 4
        assert record["bytes"]["full"] == (record["prompt_tokens"] + record["new_tokens"] - 1) * 2 * 4 * 2 * 16 * 4
        assert record["cut_tokens"] == 0 and not record["uncompressed"]
        assert set(record["agreement"]) == {"exact", "prefix", "f1"}
        assert 0 <= record["head_consensus"] <= 1
        assert (record["evicted_answer"] is None) == (record["subset"] == "trec")
        assert all(0 <= value <= 1 for value in record["score"].values())
    assert sum(record["warmup"] for record in found) == 1
    about = json.loads((finished / "uncomp-40-aware/run.json").read_text())
    assert {r["config"] for r in found} == {about["hash"]}
    assert set(about["versions"]) == {"uncomp", "commit", "torch", "transformers"}
    assert len(about["files"]) == 4 and all(len(digest) == 64 for digest in about["files"].values())


def test_full_stores_everything(finished):
    for record in records(finished / "full-full-aware"):
        assert record["stored"]["mean"] == record["prompt_tokens"]
        assert record["stored"]["end"] == record["prompt_tokens"] + record["new_tokens"] - 1
        assert record["bytes"]["kv"] == record["bytes"]["full"]
        assert "agreement" not in record and "head_consensus" not in record


def test_question_agnostic_keeps_the_whole_question(finished):
    """The context is brought to its budget before the question; all of the question stays."""
    for aware, record in zip(
        records(finished / "uncomp-40-aware"), records(finished / "uncomp-40-agnostic"), strict=True
    ):
        behind = len("\nQuestion: Which word 0?\nAnswer:" if record["subset"] == "qasper" else "\nWhich word 0?")
        assert record["stored"]["context"] == 40
        assert record["stored"]["mean"] == record["stored"]["end"] == 40 + behind
        assert record["prompt_tokens"] == aware["prompt_tokens"]


def test_what_is_compressed_decides_whether_a_record_tests_anything(model, data, tmp_path, capsys):
    """The whole prompt, or the context alone: a budget between the two leaves the context as it is."""
    limit = ("--limit", "1", "--subset", "qasper", "--question", "aware", "--question", "agnostic")
    ran(capsys, model, data, tmp_path, *limit, budget="40")
    (record,) = records(tmp_path / "longbench/uncomp-40-agnostic")
    prompt, question = record["prompt_tokens"], record["stored"]["mean"] - 40
    between = str(int(prompt - question / 2))
    aware, agnostic = ran(capsys, model, data, tmp_path, *limit, budget=between)
    assert (aware["total"]["uncompressed"], agnostic["total"]["uncompressed"]) == (0, 1)
    (record,) = records(tmp_path / f"longbench/uncomp-{between}-agnostic")
    assert record["stored"]["mean"] == prompt


def test_the_full_cache_gives_the_same_in_both_modes(finished):
    aware, agnostic = (records(finished / f"full-full-{mode}") for mode in ("aware", "agnostic"))
    assert [r["tokens"] for r in aware] == [r["tokens"] for r in agnostic]


def test_the_full_cache_is_stock_generate(finished, model):
    import torch

    from uncomp.hf.load import load_model

    stock, tokenizer = load_model(model, dtype="float32")
    for record in records(finished / "full-full-aware")[::3]:
        template = "Read this.\n{context}\nQuestion: {input}\nAnswer:"
        text = support.words(40 + 9 * record["index"], seed=record["index"])
        if record["subset"] != "qasper":
            continue
        prompt = template.format(context=text, input=f"Which word {record['index']}?")
        ids = torch.tensor([tokenizer(prompt).input_ids])
        out = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert out[0, ids.shape[1] :].tolist() == record["tokens"]


def test_summary(finished):
    summary = json.loads((finished / "snapkv-40-aware/summary.json").read_text())
    assert (summary["policy"], summary["budget"], summary["mode"], summary["task"]) == (
        "snapkv",
        40,
        "aware",
        "longbench",
    )
    assert list(summary["subsets"]) == ["qasper", "trec"]
    found = records(finished / "snapkv-40-aware")
    for name, values in summary["subsets"].items():
        scores = [next(iter(r["score"].values())) for r in found if r["subset"] == name]
        assert values["n"] == 4 and values["score"] == pytest.approx(25 * sum(scores), abs=0.006)
        assert values["stored"]["end"] == 40
        assert values["buckets"]["0-4k"]["n"] == 4
        assert values["buckets"]["8k+"] == {"n": 0, "score": None}
    assert summary["score"] == pytest.approx(sum(v["score"] for v in summary["subsets"].values()) / 2, abs=0.006)
    assert summary["total"]["stored"]["share"] == pytest.approx(
        sum(r["stored"]["end"] for r in found) / sum(r["prompt_tokens"] + r["new_tokens"] - 1 for r in found), abs=1e-5
    )


def test_stored_tokens_do_not_depend_on_the_batch(finished, model, data, tmp_path, capsys):
    """Nor, in float32 here, does any token."""
    modes = ["--question", "aware", "--question", "agnostic"]
    ran(capsys, model, data, tmp_path, "--policy", "uncomp", "--policy", "full", *modes, "--batch-size", "3")
    for name in ("uncomp-40-aware", "uncomp-40-agnostic", "full-full-agnostic"):
        together, alone = records(tmp_path / "longbench" / name), records(finished / name)
        assert {r["batch"]["size"] for r in together} == {3, 1}
        for key in ("stored", "tokens", "prompt_tokens", "evicted_answer"):
            assert [r.get(key) for r in together] == [r.get(key) for r in alone], key


def test_limit_and_json(model, data, tmp_path, capsys):
    (summary,) = ran(capsys, model, data, tmp_path, "--limit", "1", "--max-new-tokens", "2", "--per-row")
    assert summary["total"]["n"] == 2
    assert summary == json.loads((tmp_path / "longbench/uncomp-40-aware/summary.json").read_text())
    for record in records(tmp_path / "longbench/uncomp-40-aware"):
        rows = record["stored"]["per_row"]
        assert [len(layer) for layer in rows] == [4, 4] and sum(map(sum, rows)) == 8 * 40


def test_teacher_forced(model, data, tmp_path, capsys):
    """With everything stored both caches say the same; with little they do not, and the divergence tells."""
    policies = ["--policy", "full", "--policy", "uncomp", "--budget", "1.0", "--limit", "1"]
    _, little, whole = ran(capsys, model, data, tmp_path, *policies, "--teacher-forced")
    assert (little["budget"], whole["budget"]) == (40, 1.0)
    assert whole["total"]["agreement"]["argmax"] == 1.0 and abs(whole["total"]["agreement"]["kl"]) < 1e-4
    assert little["total"]["agreement"]["kl"] > 1e-3
    plain = tmp_path / "plain"
    _, again, _ = ran(capsys, model, data, plain, *policies)
    for forced, free in zip(
        records(tmp_path / "longbench/uncomp-40-aware"), records(plain / "longbench/uncomp-40-aware"), strict=True
    ):
        assert forced["tokens"] == free["tokens"] and set(free["agreement"]) == {"exact", "prefix", "f1"}
    assert again["total"]["agreement"]["kl"] is None


def test_the_passes_of_teacher_forced_are_the_models(model, data, tmp_path, capsys, monkeypatch):
    """They are no work beside it."""
    import time

    from uncomp.eval import runner

    monkeypatch.setattr(runner, "teacher_forced", lambda *given: time.sleep(0.3) or {"argmax": 1.0, "kl": 0.0})
    policies = ["--policy", "full", "--policy", "uncomp", "--subset", "trec", "--limit", "2"]
    _, forced = ran(capsys, model, data, tmp_path, *policies, "--teacher-forced")
    assert 0.6 <= forced["call"]["model_seconds"] <= forced["call"]["seconds"]


# ---- going on
def test_resume_goes_on_with_more_records(model, data, tmp_path, capsys):
    ran(capsys, model, data, tmp_path, "--limit", "1")
    (summary,) = ran(capsys, model, data, tmp_path, "--resume", "--limit", "2")
    assert summary["total"]["n"] == 4
    assert len(records(tmp_path / "longbench/uncomp-40-aware")) == 4


def test_resume_goes_on_with_a_folder_that_keeps_no_parts(model, data, tmp_path, capsys):
    """A finished run whose parts were deleted: nothing is repeated."""
    folder = tmp_path / "longbench/uncomp-40-aware"
    ran(capsys, model, data, tmp_path, "--limit", "1")
    before = records(folder)
    for part in folder.glob("part-*"):
        part.unlink()
    (summary,) = ran(capsys, model, data, tmp_path, "--limit", "2", "--resume")
    after = records(folder)
    assert len(after) == summary["total"]["n"] == 2 * len(before)
    assert all(record in after for record in before)  # seconds too


def test_what_resume_refuses(model, data, tmp_path, capsys):
    ran(capsys, model, data, tmp_path, "--limit", "1")
    status, _, err = call(capsys, model, data, tmp_path, "--limit", "1")
    assert status == 2 and "holds results already; use --resume" in err
    status, _, err = call(capsys, model, data, tmp_path, "--limit", "1", "--resume", "--max-new-tokens", "3")
    assert status == 2 and "another max_new_tokens" in err and "None there, 3 here" in err
    status, _, err = call(capsys, model, data, tmp_path, "--limit", "1", "--resume", "--window", "4")
    assert status == 2 and "another cache" in err and "window 8 there, 4 here" in err
    part = tmp_path / "longbench/uncomp-40-aware/part-0.jsonl"
    first, second = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(first + b"rubbish\n" + second)
    status, _, err = call(capsys, model, data, tmp_path, "--limit", "1", "--resume")
    assert status == 2 and "part-0.jsonl:2 is no record" in err
    part.write_bytes(first + first + second)
    status, _, err = call(capsys, model, data, tmp_path, "--limit", "1", "--resume")
    assert status == 2 and "part-0.jsonl:2 repeats the record trec/trec0" in err
    part.write_bytes(first + b"rubbish\n")  # the last line may be what a kill left
    ran(capsys, model, data, tmp_path, "--limit", "1", "--resume")
    assert part.read_bytes().startswith(first) and len(records(part.parent)) == 2


# ---- bad input
BAD = [
    (["--policy", "best"], "uncomp.UncompConfig: policy must be one of"),
    (["--policy", "uncomp:colour=3"], "unknown field colour"),
    (["--policy", "uncomp:groups"], "--policy must be NAME:field=value"),
    (["--policy", "snapkv", "--policy", "snapkv"], "give the run snapkv-40-aware twice"),
    (["--subset", "qasper,musique"], "dataset2prompt.json has no entry for musique"),
    (["--subset", "poems"], "--subset of longbench must be one of"),
    (["--subset", "qasper,qasper"], "--subset names one twice"),
    (["--max-prompt", "20"], "qasper qasper0: --max-prompt must leave room"),
    (["--max-new-tokens", "1024"], "must leave room for a prompt in the model's 1024 positions"),
    (["--budget", "0"], "uncomp.UncompConfig: budget must be"),
    (["--teacher-forced"], "--teacher-forced needs a finished run of full"),
    (["--teacher-forced", "--question", "agnostic"], "it needs --question aware"),
    (["--compare", "/none"], "examples.jsonl is missing"),
    (["--chat", "on"], "--chat on needs a tokenizer with a chat template"),
    (["--e"], "e/qasper_e.jsonl is missing"),
    (["--limit", "0"], "must be a whole number of at least 1"),
    (["--limit", "\u00b2"], "must be a whole number of at least 1"),
    (["--subset", ","], "argument --subset: must be names like a,b"),
    (["--skip-bad", "--max-prompt", "20"], "no record is left to run: 8 make no prompt"),
]


@pytest.mark.parametrize(("options", "text"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input(model, data, tmp_path, capsys, options, text):
    status, out, err = call(capsys, model, data, tmp_path, *options)
    lines = err.splitlines()
    assert (status, out, len(lines)) == (2, "", 9 if "--skip-bad" in options else 1), err
    assert err.startswith("uncomp") and text in lines[-1]
    assert not any(tmp_path.rglob("*.json"))


def test_a_bad_line_is_told_before_the_model_is_loaded(data, tmp_path, capsys):
    copy = tmp_path / "longbench"
    shutil.copytree(data, copy)
    with open(copy / "base/qasper.jsonl", "a") as file:
        file.write('{"context": "a", "input": "b", "answers": null, "length": 1}\n')
    status, _, err = call(capsys, "/no/model", copy, tmp_path / "out")
    assert status == 2
    assert f"{copy}/base/qasper.jsonl:5: field 'answers' must be a non-empty list of strings; got null" in err
    assert not (tmp_path / "out").exists()


def test_a_policy_that_does_not_fit_the_model_is_told_before_anything_is_written(model, data, tmp_path, capsys):
    status, _, err = call(capsys, model, data, tmp_path / "out", "--policy", "full", "--policy", "uncomp:groups=9")
    assert status == 2 and "groups must lie in [1, 4]" in err
    assert not (tmp_path / "out").exists()


def test_only_a_full_cache_over_the_same_prompts_is_compared_with(model, data, tmp_path, capsys):
    """Left out with a line that says why, or refused where the user asked for the comparison."""
    limit = ("--limit", "1")
    ran(capsys, model, data, tmp_path, *limit, "--policy", "full", "--max-prompt", "300")
    status, _, err = call(capsys, model, data, tmp_path, *limit)
    assert status == 0 and "full-full-aware is a run with another max_prompt: 300 there, None here" in err
    assert not any("agreement" in r for r in records(tmp_path / "longbench/uncomp-40-aware"))
    full = tmp_path / "longbench/full-full-aware"
    for options in (["--teacher-forced"], ["--compare", str(full)]):
        status, _, err = call(capsys, model, data, tmp_path / "other", *limit, *options, "--compare", str(full))
        assert status == 2 and "is a run with another max_prompt" in err and not (tmp_path / "other").exists()
    status, _, err = call(capsys, model, data, tmp_path / "other", "--compare", str(full.parent / "uncomp-40-aware"))
    assert status == 2 and "another policy than full: uncomp" in err
    ran(capsys, model, data, tmp_path / "other", "--compare", str(full), "--max-prompt", "300", "--subset", "trec")
    compared = records(tmp_path / "other/longbench/uncomp-40-aware")
    assert ["agreement" in r for r in compared] == [True] + 3 * [False]


def test_records_that_a_folder_could_not_tell_apart(model, data, tmp_path, capsys):
    """A line without an id is named by its number, which another line may have for its id."""
    copy = tmp_path / "longbench"
    shutil.copytree(data, copy)
    path = copy / "base/trec.jsonl"
    first, second, *_ = map(json.loads, path.read_text().splitlines())
    del second["_id"]
    path.write_text("\n".join(json.dumps(r) for r in ({**first, "_id": "2"}, second)) + "\n")
    status, _, err = call(capsys, model, copy, tmp_path / "out", "--subset", "trec")
    assert status == 2 and "ids, lengths and depths must differ; trec/2 is there twice" in err
    assert not (tmp_path / "out").exists()
    (copy / "config/dataset2maxlen.json").write_text('{"trec": 0}')
    status, _, err = call(capsys, model, copy, tmp_path / "out", "--subset", "trec")
    assert status == 2 and "dataset2maxlen.json: trec must be at least 1; got 0" in err


def test_skip_bad_leaves_a_line_out_and_says_so(model, data, tmp_path, capsys):
    copy = tmp_path / "longbench"
    shutil.copytree(data, copy)
    lines = (copy / "base/trec.jsonl").read_text().splitlines()
    lines[1] = lines[1][:30]
    (copy / "base/trec.jsonl").write_text("\n".join(lines) + "\n")
    status, out, err = call(
        capsys, model, copy, tmp_path / "out", "--skip-bad", "--json", "--subset", "trec", "--max-prompt", "330"
    )
    assert status == 0 and "base/trec.jsonl:2: no JSON" in err
    assert json.loads(out)["total"]["n"] == 3


def test_a_template_takes_text_alone(model, data, tmp_path, capsys):
    copy = tmp_path / "longbench"
    shutil.copytree(data, copy)
    (copy / "config/dataset2prompt.json").write_text('{"trec": "{context} of {length} words {nothing}"}')
    status, _, err = call(capsys, model, copy, tmp_path / "out", "--subset", "trec")
    assert status == 2 and not (tmp_path / "out").exists()
    wanted = "base/trec.jsonl:1: field 'length' must be a string, because the template has {length}\n"
    assert err == f"uncomp eval: {copy}/{wanted}"


def test_another_model_of_the_same_shape(model, data, tmp_path, capsys):
    """Cannot go on with a run, and is not compared with it; a run.json that does not tell the weights is believed."""
    from safetensors.torch import load_file, save_file

    tuned = tmp_path / "tuned"
    shutil.copytree(model, tuned)
    tensors = load_file(tuned / "model.safetensors")
    save_file({name: 1.01 * t for name, t in tensors.items()}, tuned / "model.safetensors", {"format": "pt"})
    ran(capsys, model, data, tmp_path, "--limit", "1", "--policy", "full")
    given = (tuned, data, tmp_path, "--limit", "1", "--policy")
    status, _, err = call(capsys, *given, "full", "--resume")
    assert status == 2 and "is a run with another weights" in err
    status, _, err = call(capsys, *given, "uncomp")
    assert status == 0 and "is a run with another weights" in err
    path = tmp_path / "longbench/full-full-aware/run.json"
    told = json.loads(path.read_text())
    del told["config"]["weights"]
    path.write_text(json.dumps(told))
    assert call(capsys, *given, "full", "--resume")[0] == 0


def test_a_prompt_that_is_cut_is_said(model, data, tmp_path, capsys):
    status, out, _ = call(capsys, model, data, tmp_path, "--limit", "1", "--max-prompt", "300", "--subset", "qasper")
    assert status == 0 and out.endswith("%); 1 prompts were cut in the middle\n")
    status, out, _ = call(capsys, model, data, tmp_path / "whole", "--limit", "1", "--subset", "qasper")
    assert status == 0 and out.endswith("%)\n")


def test_a_policy_keeps_the_decode_rule_it_names(model, data, tmp_path, capsys):
    ran(capsys, model, data, tmp_path, "--limit", "1", "--policy", "uncomp:decode=grow")
    ends = [
        r["stored"]["end"] - r["stored"]["mean"] for r in records(tmp_path / "longbench/uncomp_decode_grow-40-aware")
    ]
    assert min(ends) > 0


def test_a_folder_takes_one_process_at_a_time(model, data, tmp_path, capsys):
    """Two that go on with one run would write its records twice, and no later call could read them."""
    from uncomp.eval.folder import RunFolder

    ran(capsys, model, data, tmp_path, "--limit", "1")
    path = tmp_path / "longbench/uncomp-40-aware"
    held = RunFolder(path, json.loads((path / "run.json").read_text())["config"])
    held.open({}, resume=True)
    status, _, err = call(capsys, model, data, tmp_path, "--limit", "1", "--resume")
    assert status == 2 and err == f"uncomp eval: {path} is being written by another process\n"
    del held
    ran(capsys, model, data, tmp_path, "--limit", "2", "--resume")


def test_a_folder_whose_name_is_no_text(model, data, tmp_path, capsys):
    import os

    out = tmp_path / os.fsdecode(b"out\xff")
    ran(capsys, model, data, out, "--limit", "1")
    assert json.loads((out / "longbench/uncomp-40-aware/run.json").read_text())["options"]["out"] == str(out)


def test_a_full_disk(model, data, tmp_path, capsys, monkeypatch):
    """Status 1, one line, and what was written before is whole."""
    from uncomp.eval import folder as folders

    before, calls = folders.RunFolder.append, []

    def full(self, rank, made):
        calls.append(rank)
        if len(calls) == 3:
            path = self.path / f"part-{rank}.jsonl"
            raise folders.RunFailure(f"uncomp eval: {path} cannot be written (No space left on device)")
        before(self, rank, made)

    monkeypatch.setattr(folders.RunFolder, "append", full)
    status, _, err = call(capsys, model, data, tmp_path)
    assert status == 1 and err.count("\n") == 1 and "No space left on device" in err
    monkeypatch.setattr(folders.RunFolder, "append", before)
    ran(capsys, model, data, tmp_path, "--resume")
    assert len(records(tmp_path / "longbench/uncomp-40-aware")) == 8
