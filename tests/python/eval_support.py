# SPDX-License-Identifier: Apache-2.0
"""A model folder and benchmark folders small enough for tests of `uncomp eval`."""

from __future__ import annotations

import json
import random
from pathlib import Path

POSITIONS = 1024
VOLATILE = ("seconds", "batch", "warmup")


def make_model(folder: Path) -> Path:
    """A tiny Llama of random weights with a byte tokenizer, as an ordinary folder."""
    from uncomp.testing import tiny_model, tiny_tokenizer

    sizes = {"vocab_size": 260, "num_hidden_layers": 2, "head_dim": 16, "max_position_embeddings": POSITIONS}
    model = tiny_model("llama", **sizes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0) -> str:
    """Made-up sentences of lower-case words."""
    draw = random.Random(seed)
    made = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 8))) for _ in range(count)]
    return " ".join(word + "." if i % 7 == 6 else word for i, word in enumerate(made))


def make_longbench(folder: Path, records: int = 3) -> Path:
    """Two tasks in the layout of LongBench, with templates of our own."""
    (folder / "config").mkdir(parents=True)
    (folder / "base").mkdir()
    prompts = {
        "qasper": "Read this.\n{context}\nQuestion: {input}\nAnswer:",
        "trec": "Name the type.\n{context}\n{input}",
    }
    (folder / "config/dataset2prompt.json").write_text(json.dumps(prompts))
    (folder / "config/dataset2maxlen.json").write_text(json.dumps({"qasper": 6, "trec": 4}))
    for name in prompts:
        lines = []
        for i in range(records):
            text = words(40 + 9 * i, seed=i)
            record = {"context": text, "input": f"Which word {i}?", "answers": [text.split()[3]], "length": 40 + 9 * i}
            record |= {"_id": f"{name}{i}", "all_classes": ["Date", "Number"] if name == "trec" else None}
            lines.append(json.dumps(record | ({"answers": ["Date"]} if name == "trec" else {})))
        (folder / f"base/{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_essays(folder: Path) -> Path:
    """Two essays and a needle."""
    (folder / "PaulGrahamEssays").mkdir(parents=True)
    for i in range(2):
        (folder / f"PaulGrahamEssays/{i}.txt").write_text(words(200, seed=i) + "\n")
    needle = {"needle": "\nThe key is under the blue pot.\n", "question": "Where is the key?", "answer": "the blue pot"}
    (folder / "needles.json").write_text(json.dumps([needle]))
    return folder


# ---- calls
def arguments(model, data, out, *options, task="longbench", budget="40"):
    """Of `uncomp`, for the tiny model on the CPU."""
    base = ["eval", task, "--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu"]
    subset = ["--subset", "qasper,trec"] if task == "longbench" and "--subset" not in options else []
    return [*base, "--dtype", "float32", "--budget", budget, *subset, *options]


def call(capsys, *given, **named):
    """(status, stdout, stderr)"""
    from uncomp import cli

    try:
        status = cli.main(arguments(*given, **named))
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def ran(capsys, *given, **named):
    """Summaries by folder name."""
    status, out, err = call(capsys, *given, "--json", **named)
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()]


def records(folder):
    return [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]


def steady(folder):
    """Records without what differs from call to call: times, batches, bytes of layout that a batch shares."""
    made = [{k: v for k, v in record.items() if k not in VOLATILE} for record in records(folder)]
    return [{**record, "bytes": {**record["bytes"], "votes": 0}} for record in made]
