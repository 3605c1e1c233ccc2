# SPDX-License-Identifier: Apache-2.0
"""A small benchmark in the layout of LongBench, made of text that is on every machine; for examples and tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

TASK = "passage_count"  # scored by the numbers of an answer
TEMPLATE = "Read the text.\n\n{context}\n\nQuestion: {input}\nAnswer:"


def write(folder: Path, *, records: int = 3, characters: int = 600, new_tokens: int = 14, seed: int = 0) -> Path:
    """Writes records whose context hides a sentence with a number, and a template of this package's own.

    Args:
        folder: where `base/`, `config/` go; made if missing.
        records: how many. characters: of each context. new_tokens: that a model may answer with.
        seed: of the numbers and their places.
    Returns:
        the folder, for `uncomp eval longbench --data`.
    """
    from uncomp.testing import example_text

    draw, text = random.Random(seed), example_text()
    for name in ("base", "config"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "config/dataset2prompt.json").write_text(json.dumps({TASK: TEMPLATE}))
    (folder / "config/dataset2maxlen.json").write_text(json.dumps({TASK: new_tokens}))
    lines = []
    for i in range(records):
        words = text[i * characters : (i + 1) * characters].split()
        room, number = draw.choice(["blue", "red", "green", "white"]), draw.randint(1000, 9999)
        words.insert(draw.randrange(len(words)), f"\nThe number of the {room} room is {number}.\n")
        context = " ".join(words)
        question = f"What is the number of the {room} room?"
        record = {"_id": str(i), "context": context, "input": question, "answers": [str(number)]}
        lines.append(json.dumps(record | {"length": len(context.split()), "all_classes": None}))
    (folder / f"base/{TASK}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
