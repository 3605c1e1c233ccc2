# SPDX-License-Identifier: Apache-2.0
"""GSM8K, zero-shot and few-shot: grade-school problems whose answers end in a number."""

from __future__ import annotations

import random
import re
from pathlib import Path

from uncomp.eval.metrics import number_after
from uncomp.eval.prompts import Example
from uncomp.eval.reading import Reader, is_text
from uncomp.eval.tasks.base import Options, Source

NEW_TOKENS = 512
ASK = 'Solve the problem step by step. End with a line "Answer: <number>".\n\n'
_FIELDS = {"question": is_text, "answer": is_text}


def read(options: Options, reader: Reader) -> Source:
    """Reads the one `test*.jsonl` of the folder and, for `--shots`, the one `train*.jsonl`.

    Raises:
        ValueError: no such file or several, a bad line, too few worked examples.
    """
    folder = options.folder("gsm8k")
    options.chosen("gsm8k", ["gsm8k"])
    shots = _shots(folder, options, reader) if options.shots else ""
    examples = []
    file = _one(folder, "test")
    for number, record in reader.lines(file, _FIELDS):
        answer = record["answer"].split("####")[-1].strip()
        if number_after(answer) is None:
            reader.refuse(file, number, "field 'answer' must end in a number after ####")
            continue
        text = f"{ASK}{shots}Problem: {record['question'].strip()}\n\nSolution:"
        if shots:
            text = text.removesuffix("\n\nSolution:") + "\nSolution:"
        examples.append(
            Example(
                task="gsm8k",
                subset="gsm8k",
                id=str(number),
                text=text,
                context_end=len(ASK + shots) if shots else 0,
                max_new_tokens=options.max_new_tokens or NEW_TOKENS,
                metrics=("gsm8k",),
                answers=[answer],
                details={"until": "Problem:"} if shots else {},
            )
        )
    settings = {"shots": options.shots} | ({"seed": options.seed} if options.shots else {})
    return Source(settings, lambda tokenizer, positions: examples[: options.limit])


def _one(folder: Path, kind: str) -> Path:
    found = sorted(folder.glob(f"{kind}*.jsonl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"uncomp eval: {folder} must hold one {kind}*.jsonl; got {names}")
    return found[0]


def _shots(folder: Path, options: Options, reader: Reader) -> str:
    """Worked examples, one draw for the whole run."""
    pool = [record for _, record in reader.lines(_one(folder, "train"), _FIELDS)]
    if options.shots > len(pool):
        raise ValueError(f"uncomp eval: --shots must be at most {len(pool)}, what the file holds; got {options.shots}")
    text = ""
    for record in random.Random(options.seed).sample(pool, options.shots):
        steps, _, number = re.sub(r"<<.*?>>", "", record["answer"]).partition("####")
        text += f"Problem: {record['question'].strip()}\nSolution: {steps.strip()}\nAnswer: {number.strip()}\n\n"
    return text
