# SPDX-License-Identifier: Apache-2.0
"""A model folder and benchmark folders small enough for tests of `uncomp eval`."""

from __future__ import annotations

import json
import random
from pathlib import Path

POSITIONS = 1024


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
