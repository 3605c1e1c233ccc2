# SPDX-License-Identifier: Apache-2.0
"""What each task asks: where needles stand, what is generated from a seed, what is read from files."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import eval_support as support
from support import shared_data

from uncomp import cli
from uncomp.eval.prompts import encode
from uncomp.eval.reading import BadLine, Reader
from uncomp.eval.tasks import TASKS, Options, gsm8k, longbench, needle, ruler
from uncomp.eval.tasks.hay import Hay, place
from uncomp.testing import tiny_tokenizer

POSITIONS = 8192


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def essays(tmp_path_factory):
    return support.make_essays(tmp_path_factory.mktemp("essays"))


def make(task, tokenizer, folder, **options):
    reader = Reader()
    return TASKS[task](Options(data=Path(folder), **options), reader).examples(tokenizer, POSITIONS)


def size(tokenizer, example):
    return len(encode(tokenizer, example.text + example.prefix)[0])


# ---- needle
def test_hay_is_cut_to_tokens_and_repeated(tokenizer):
    hay = Hay(tokenizer, "One. Two.")
    text, starts = hay.cut(25)
    assert text == "One. Two.\nOne. Two.\nOne. " and starts == list(range(25))
    assert hay.cut(4)[0] == "One."


@pytest.mark.parametrize(("depth", "at"), [(0, 0), (20, 0), (40, 4), (60, 9), (99, 9), (100, 15)])
def test_a_needle_stands_behind_a_sentence(depth, at):
    text = "One. Two! abcde"
    assert place(text, list(range(15)), depth) == at


def test_needle_prompts(tokenizer, essays):
    made = make("needle", tokenizer, essays, lengths=[700, 900], depths=[0, 50, 100])
    assert [e.id for e in made] == [f"0-{n}-{d}" for n in (700, 900) for d in (0, 50, 100)]
    for example in made:
        length = example.details["length"]
        assert length - needle.SPARE < size(tokenizer, example) <= length
        assert example.text.count("The key is under the blue pot.") == 1
        assert example.text[example.context_end :] == "Question: Where is the key?\nAnswer:"
        assert example.details["stem"] == "The key is under "
        assert example.answers == ["the blue pot"] and example.max_new_tokens == 30
    first, middle, last = (e.text.index("The key is under") for e in made[:3])
    assert first < 40 and last > made[2].context_end - 120
    assert abs(middle - (700 - needle.SPARE - 32) / 2) < 60
    assert made[1].text[:middle].rstrip().endswith(".")


def test_several_needles(tokenizer, essays):
    made = make("needle", tokenizer, essays, subsets=["several"], lengths=[900], depths=[0, 22, 67])
    for example in made:
        codes = re.findall(r"The secret code of (\w+) is (\d{5})\.", example.text)
        assert sorted(city for city, _ in codes) == sorted(needle.CITIES)
        asked = re.search(r"Question: What is the secret code of (\w+)\?", example.text)[1]
        assert example.answers == [dict(codes)[asked]]
    again = make("needle", tokenizer, essays, subsets=["several"], lengths=[900], depths=[0, 22, 67])
    assert again == made
    assert make("needle", tokenizer, essays, subsets=["several"], lengths=[900], depths=[0], seed=1) != made[:1]


def test_default_lengths_reach_the_model(tokenizer, essays):
    made = make("needle", tokenizer, essays, depths=[50])
    lengths = [e.details["length"] for e in made]
    assert (lengths[0], lengths[-1], len(lengths)) == (1000, POSITIONS - 30, 10)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lengths": [POSITIONS]}, "--length must be from 400 to 8162"),
        ({"depths": [101]}, "--depths must be per cent"),
        ({"subsets": ["many"]}, "--subset of needle must be one of single, several; got many"),
    ],
)
def test_needles_that_cannot_be(tokenizer, essays, options, text):
    with pytest.raises(ValueError, match=f"^uncomp eval: {text}"):
        make("needle", tokenizer, essays, **options)


def test_needle_files_are_checked(tokenizer, essays, tmp_path):
    with pytest.raises(ValueError, match=r"has no .txt file to hide a needle in"):
        make("needle", tokenizer, tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"needles.json is missing"):
        make("needle", tokenizer, tmp_path)
    (tmp_path / "needles.json").write_text('[{"needle": "a b", "question": "?", "answer": "c"}]')
    with pytest.raises(ValueError, match="the answer must be a part of the needle"):
        make("needle", tokenizer, tmp_path)
    needle = {"needle": "a long needle. " * 20, "question": "?", "answer": "needle"}
    (tmp_path / "needles.json").write_text(json.dumps([needle]))
    with pytest.raises(ValueError, match=r"^uncomp eval: --length must be at least 5\d\d for a needle of 3\d\d tokens"):
        make("needle", tokenizer, tmp_path, lengths=[400])
    (tmp_path / "needles.json").write_text(json.dumps([{**needle, "needle": "a needle.", "question": "what? " * 50}]))
    with pytest.raises(ValueError, match=r"^uncomp eval: a needle's question must have at most 100 tokens; got 3\d\d"):
        make("needle", tokenizer, tmp_path, lengths=[400])


# ---- ruler
@pytest.fixture(scope="module")
def generated(tokenizer, essays):
    made = make("ruler", tokenizer, essays, lengths=[1500, 2500], samples=2)
    return {name: [e for e in made if e.subset == f"{name}_1500"] for name in [*ruler.RETRIEVAL, *ruler.LISTS]}


@pytest.mark.parametrize("name", [*ruler.RETRIEVAL, *ruler.LISTS])
def test_every_ruler_task_fits_its_length_and_holds_its_answer(tokenizer, generated, name):
    assert len(generated[name]) == 2
    for example in generated[name]:
        assert 0.85 * 1500 < size(tokenizer, example) <= 1500 - ruler.FRAME
        context = example.text[: example.context_end]
        assert example.answers and all(answer in context for answer in example.answers)
        assert all(answer not in example.text[example.context_end :] + example.prefix for answer in example.answers)
        assert all(piece in context for piece in example.evidence)
        assert example.text[example.context_end - 1] == "\n"
    assert generated[name][0].text != generated[name][1].text


def test_ruler_comes_from_its_seed(tokenizer, essays, generated):
    again = make("ruler", tokenizer, essays, subsets=["niah_multikey_1"], lengths=[1500], samples=2)
    assert again == generated["niah_multikey_1"]  # whatever else was asked for
    other = make("ruler", tokenizer, essays, subsets=["niah_multikey_1"], lengths=[1500], samples=2, seed=1)
    assert other != again


def test_ruler_counts(generated):
    wanted = {"niah_single_1": 1, "niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    for name, count in wanted.items():
        text = generated[name][0].text
        assert len(re.findall(r"One of the special magic numbers for [a-z-]+ is: \d{7}\.", text)) == count, name
    answers = {name: len(made[0].answers) for name, made in generated.items()}
    assert answers == dict.fromkeys(answers, 1) | {
        "niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3,
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f-]{36}", generated["niah_multikey_3"][0].answers[0])


def test_common_and_frequent_words_are_the_most_frequent(generated):
    for name, pattern in (("cwe", r"\d+\. ([a-z]+)"), ("fwe", r"\b([a-z]{6})\b")):
        for example in generated[name]:
            body = example.text[: example.context_end].split("\n", 1)[1]
            counts = Counter(re.findall(pattern, body)).most_common()
            asked = len(example.answers)
            assert {word for word, _ in counts[:asked]} == set(example.answers)
            assert counts[asked - 1][1] > counts[asked][1]


def test_a_chain_of_variables(generated):
    example = generated["vt"][0]
    found = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\n", example.text)
    assert len(found) == 5 and found[0][1].isdigit()
    assert [a for a, _ in found] == example.answers
    assert [b for _, b in found[1:]] == example.answers[:-1]


def test_ruler_from_a_file(tokenizer, tmp_path):
    (tmp_path / "ruler").mkdir()
    text = "A number is hidden.\nThe number for x is: 7.\nWhat is the number for x? The number for x is"
    (tmp_path / "ruler/mine.jsonl").write_text(json.dumps({"index": 3, "input": text, "outputs": ["7"]}) + "\n")
    (example,) = make("ruler", tokenizer, tmp_path, subsets=["mine"])
    assert example.id == "3" and example.prefix == " The number for x is"
    assert example.text[example.context_end :] == "What is the number for x?"


def test_ruler_refuses(tokenizer, essays):
    with pytest.raises(ValueError, match=r"^uncomp eval: qa_1 needs questions"):
        make("ruler", tokenizer, essays, subsets=["qa_1"])
    with pytest.raises(ValueError, match=r"^uncomp eval: --length must be at most 8064 for niah_single_1"):
        make("ruler", tokenizer, essays, subsets=["niah_single_1"], lengths=[POSITIONS])
    with pytest.raises(ValueError, match=r"^uncomp eval: --length must be longer for niah_multikey_1; 200 tokens"):
        make("ruler", tokenizer, essays, subsets=["niah_multikey_1"], lengths=[200])
    with pytest.raises(ValueError, match=r"^uncomp eval: --length must be more than \d+ for niah_single_1; got 10"):
        make("ruler", tokenizer, essays, subsets=["niah_single_1"], lengths=[10])


def test_ruler_needs_enough_words(tokenizer, tmp_path):
    """Three words make six keys of two, and a haystack of needles wants hundreds."""
    (tmp_path / "a.txt").write_text("four. five. three.\n" * 50)
    with pytest.raises(ValueError, match=r"different words of 4 to 9 letters; 3 do not make enough pairs"):
        make("ruler", tokenizer, tmp_path, subsets=["niah_multikey_2"], lengths=[2000])
    with pytest.raises(ValueError, match=r"must have 10 different words of 4 to 9 letters; got 3"):
        make("ruler", tokenizer, tmp_path, subsets=["cwe"], lengths=[2000])


def test_ruler_counts_are_the_published_ones():
    text = shared_data("ruler/synthetic.yaml").read_text()
    for name, kind in ruler.RETRIEVAL.items():
        block = text.split(f"\n{name}:", 1)[1].split("\n\n", 1)[0]
        found = dict(re.findall(r"(type_\w+|num_\w+): (\w+)", block))
        hay = {"repeat": "filler"}.get(found["type_haystack"], found["type_haystack"])
        keys = max(int(found["num_needle_k"]), int(found["num_needle_q"]))
        assert (hay, keys, int(found["num_needle_v"]), int(found["num_needle_q"])) == (
            kind.hay, kind.keys, kind.values, kind.asked,
        ), name  # fmt: skip
        assert (found["type_needle_k"], found["type_needle_v"]) == (f"{kind.key}s", f"{kind.value}s")


# ---- gsm8k
def make_gsm8k(folder):
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(5)
    ]
    for name in ("test_half", "train_some"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_gsm8k(tokenizer, tmp_path):
    make_gsm8k(tmp_path)
    made = make("gsm8k", tokenizer, tmp_path, limit=2)
    assert [e.answers for e in made] == [["1"], ["2"]] and made[0].max_new_tokens == gsm8k.NEW_TOKENS
    assert made[0].text == gsm8k.ASK + "Problem: What is 0 + 1?\n\nSolution:" and made[0].context_end == 0
    shots = make("gsm8k", tokenizer, tmp_path, shots=2)
    assert (made[0].details, shots[0].details) == ({}, {"until": "Problem:"})
    assert shots[0].text.count("Problem: ") == 3 and shots[0].text.endswith("Problem: What is 0 + 1?\nSolution:")
    context = shots[0].text[: shots[0].context_end]
    assert context.count("\nAnswer: ") == 2 and "<<" not in context and context.endswith("\n\n")
    assert {e.text[: e.context_end] for e in shots} == {context}  # one draw a run
    assert make("gsm8k", tokenizer, tmp_path, shots=2, seed=1)[0].text != shots[0].text


def test_gsm8k_refuses(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"must hold one test\*.jsonl; got none"):
        make("gsm8k", tokenizer, tmp_path)
    make_gsm8k(tmp_path)
    with pytest.raises(ValueError, match="--shots must be at most 5"):
        make("gsm8k", tokenizer, tmp_path, shots=6)
    (tmp_path / "test_half.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(BadLine, match=r"test_half.jsonl:1: field 'answer' must end in a number"):
        make("gsm8k", tokenizer, tmp_path)


# ---- infinitebench
def test_infinitebench(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"holds none of passkey.jsonl, "):
        make("infinitebench", tokenizer, tmp_path)
    record = {"id": 4, "context": "long", "input": "which?", "answer": ["B"], "options": ["one", "two"]}
    (tmp_path / "code_debug.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=r"templates.json is missing"):
        make("infinitebench", tokenizer, tmp_path)
    (tmp_path / "templates.json").write_text('{"code_debug": "{context}\\n{input}\\n{options}\\n"}')
    (example,) = make("infinitebench", tokenizer, tmp_path)
    assert example.text == "long\nwhich?\nA. one\nB. two\n" and example.context_end == 4
    assert (example.id, example.answers, example.options, example.metrics) == ("4", ["B"], ["one", "two"], ("choice",))
    with pytest.raises(ValueError, match=r"passkey.jsonl is missing|must hold a text with \{context\} for passkey"):
        make("infinitebench", tokenizer, tmp_path, subsets=["passkey"])


# ---- longbench
def test_longbench_from_its_own_files(tokenizer):
    """Every record of the sixteen tasks and of LongBench-E that are at hand is read and makes an example."""
    folder = shared_data("longbench")
    made = make("longbench", tokenizer, folder)
    counts = Counter(e.subset for e in made)
    assert set(counts) == set(longbench.METRIC) and sum(counts.values()) == 276
    assert all(0 < e.context_end <= len(e.text) and e.answers for e in made)
    assert sum(Counter(e.subset for e in make("longbench", tokenizer, folder, e=True)).values()) == 200


def test_longbench_through_datasets(tokenizer, tmp_path, monkeypatch):
    """The same records as from files, fetched once; a stand-in for the package, which needs the network."""
    folder = support.make_longbench(tmp_path / "longbench")
    asked = []

    def load_dataset(repository, name, split):
        asked.append((repository, name, split))
        if name != "qasper":
            raise RuntimeError("no such subset\nmore")
        return list(map(json.loads, (folder / "base/qasper.jsonl").read_text().splitlines()))

    monkeypatch.setenv("UNCOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"^uncomp eval: --hub needs the datasets package"):
        make("longbench", tokenizer, folder, subsets=["qasper"], hub="some/set")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for _ in range(2):
        found = make("longbench", tokenizer, folder, subsets=["qasper"], hub="some/set")
        assert found == make("longbench", tokenizer, folder, subsets=["qasper"])
    assert asked == [("some/set", "qasper", "test")]
    with pytest.raises(ValueError, match=r"^uncomp eval: --hub some/set did not give trec \(no such subset\)$"):
        make("longbench", tokenizer, folder, subsets=["trec"], hub="some/set")
    assert [path.name for path in (tmp_path / "cache/data/some--set").iterdir()] == ["qasper.jsonl"]


# ---- end to end
@pytest.mark.slow
def test_every_task_runs(tokenizer, essays, tmp_path, capsys):
    """Two records of each on the tiny model, whose dtype the command chooses."""
    model = support.make_model(tmp_path / "model")
    (tmp_path / "gsm8k").mkdir()
    make_gsm8k(tmp_path / "gsm8k")
    tasks = {
        "needle": [essays, "--length", "600", "--depths", "0,100", "--max-new-tokens", "4"],
        "ruler": [essays, "--subset", "niah_single_2,vt", "--length", "600", "--samples", "1", "--max-new-tokens", "4"],
        "gsm8k": [tmp_path / "gsm8k", "--shots", "2", "--limit", "2", "--max-new-tokens", "4"],
    }
    for task, (data, *options) in tasks.items():
        given = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--budget", "40"]
        modes = ["--question", "agnostic"] + (["--question", "aware"] if task == "needle" else [])
        assert cli.main(["eval", task, *given, *modes, "--device", "cpu", "--json", *options]) == 0
        for line in capsys.readouterr().out.splitlines():
            summary = json.loads(line)
            assert summary["task"] == task and summary["total"]["n"] == 2
            assert summary["total"]["stored"]["end"] >= 40
