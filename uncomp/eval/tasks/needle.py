# SPDX-License-Identifier: Apache-2.0
"""A needle in a haystack: a sentence hidden at a depth of a long text, and a question about it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from uncomp.eval.prompts import Example, encode, fill
from uncomp.eval.reading import Reader, is_text
from uncomp.eval.tasks.base import Options, Source, find
from uncomp.eval.tasks.hay import Hay, essays, insert, place

NEW_TOKENS = 30
SPARE = 200  # tokens of a prompt that are neither hay nor needle: question, template, chat frame
DEPTHS = (0, 11, 22, 33, 44, 56, 67, 78, 89, 100)  # per cent
TEMPLATE = (
    "Below is a long text.\n\n{context}\n\nUsing only the text above, answer in one short sentence.\n"
    "Question: {question}\nAnswer:"
)
CITIES = ("Lisbon", "Nairobi", "Osaka", "Quito", "Tallinn")


def read(options: Options, reader: Reader) -> Source:
    """Reads the essays and, for the subset `single`, `needles.json`; `several` hides five sentences and asks for one.

    Raises:
        ValueError: missing or bad files, an unknown subset, lengths or depths out of range.
    """
    subsets = options.chosen("needle", ["single", "several"], ["single"])
    text = essays(options, reader, "needle")
    depths = tuple(DEPTHS if options.depths is None else options.depths)
    if bad := [d for d in depths if not 0 <= d <= 100]:
        raise ValueError(f"uncomp eval: --depths must be per cent from 0 to 100; got {bad[0]}")
    needles = _needles(options, reader) if "single" in subsets else []
    settings = {"subsets": subsets, "depths": list(depths), "lengths": options.lengths and list(options.lengths)}
    settings |= {"seed": options.seed} if "several" in subsets else {}

    def examples(tokenizer: Any, positions: int) -> list[Example]:
        hay = Hay(tokenizer, text)
        made = []
        for subset in subsets:
            some = [
                _example(tokenizer, hay, subset, i, group, length, depth, options)
                for i, group in enumerate(needles if subset == "single" else [_cities(options.seed)])
                for length in _lengths(options, positions)
                for depth in depths
            ]
            made += some[: options.limit]
        return made

    return Source(settings, examples)


def _lengths(options: Options, positions: int) -> Sequence[int]:
    most = positions - (options.max_new_tokens or NEW_TOKENS)
    if options.lengths is None:
        least = min(1000, most)
        return sorted({least + i * (most - least) // 9 for i in range(10)})
    for length in options.lengths:
        if not 2 * SPARE <= length <= most:
            raise ValueError(
                f"uncomp eval: --length must be from {2 * SPARE} to {most}, what the model takes; got {length}"
            )
    return options.lengths


def _needles(options: Options, reader: Reader) -> list[list[dict[str, str]]]:
    file = find(options.folder("needle"), "needles.json", "niah/needles.json")
    found = reader.json(file, list)
    for i, entry in enumerate(found):
        for name in ("needle", "question", "answer"):
            if not isinstance(entry, dict) or not is_text(entry.get(name)):
                raise ValueError(f"uncomp eval: {file}: entry {i}: field '{name}' must be a non-empty string")
        if entry["answer"] not in entry["needle"]:
            raise ValueError(f"uncomp eval: {file}: entry {i}: the answer must be a part of the needle")
    if not found:
        raise ValueError(f"uncomp eval: {file} holds no needle")
    return [[entry] for entry in found]


def _cities(seed: int) -> list[dict[str, str]]:
    draw = random.Random(f"{seed}:needle")
    codes = draw.sample(range(10000, 100000), len(CITIES))
    return [
        {
            "needle": f"\nThe secret code of {city} is {code}.\n",
            "question": f"What is the secret code of {city}?",
            "answer": str(code),
        }
        for city, code in zip(CITIES, codes, strict=True)
    ]


def _example(
    tokenizer: Any,
    hay: Hay,
    subset: str,
    number: int,
    group: list[dict[str, str]],
    length: int,
    depth: int,
    options: Options,
) -> Example:
    asked = group[(depth + length) % len(group)]
    others = [entry for entry in group if entry is not asked]
    taken = sum(len(encode(tokenizer, entry["needle"])[0]) for entry in group)
    if length < SPARE + taken + 1:
        raise ValueError(
            f"uncomp eval: --length must be at least {SPARE + taken + 1} for a needle of {taken} tokens; got {length}"
        )
    text, starts = hay.cut(length - SPARE - taken)
    pieces = [(place(text, starts, depth), asked["needle"])]
    for i, other in enumerate(others):  # the others stand at even distances, wherever the asked one is
        pieces.append((place(text, starts, 100 * (i + 1) / (len(others) + 1)), other["needle"]))
    values = {"context": insert(text, pieces), "question": asked["question"]}
    filled, ends = fill(TEMPLATE, values)
    if (tokens := len(encode(tokenizer, asked["question"])[0])) > SPARE // 2:
        raise ValueError(f"uncomp eval: a needle's question must have at most {SPARE // 2} tokens; got {tokens}")
    needle = asked["needle"].strip()
    return Example(
        task="needle",
        subset=subset,
        id=f"{number}-{length}-{depth}",
        text=filled,
        context_end=ends["question"] - len("Question: ") - len(asked["question"]),
        max_new_tokens=options.max_new_tokens or NEW_TOKENS,
        metrics=("hit", "rouge1", "rouge1_stem"),
        answers=[asked["answer"]],
        evidence=[needle],
        details={
            "length": length,
            "depth": depth,
            "stem": needle[: needle.index(asked["answer"])],
            "needle": needle,
        },
    )
