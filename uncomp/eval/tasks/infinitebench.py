# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench from the benchmark's own files and templates that the user writes beside them."""

from __future__ import annotations

from typing import Any

from uncomp.eval.prompts import Example, fill
from uncomp.eval.reading import Reader, is_string, is_text
from uncomp.eval.tasks.base import Options, Source, find

METRIC = {
    "passkey": "first_number",
    "number_string": "first_number",
    "kv_retrieval": "among_words",
    "longbook_qa_eng": "words_f1",
    "longbook_qa_chn": "characters",
    "longbook_sum_eng": "rouge_lsum",
    "longbook_choice_eng": "choice",
    "longdialogue_qa_eng": "among_capitals",
    "code_debug": "choice",
    "code_run": "last_integer",
    "math_find": "first_value",
    "math_calc": "before_first_error",
}
NEW_TOKENS = {"kv_retrieval": 100, "longbook_sum_eng": 1536, "math_calc": 64000}  # 32 for the others
ONLY_BY_NAME = ("math_calc",)


def read(options: Options, reader: Reader) -> Source:
    """Reads `TASK.jsonl` of every chosen task that is there, or of every one named, and `templates.json`.

    Raises:
        ValueError: a missing file or template, an unknown task, a bad line.
    """
    folder = options.folder("infinitebench")
    there = [name for name in METRIC if name not in ONLY_BY_NAME and (folder / f"{name}.jsonl").is_file()]
    names = options.chosen("infinitebench", list(METRIC), there)
    if not names:
        raise ValueError(f"uncomp eval: {folder} holds none of {', '.join(f'{name}.jsonl' for name in METRIC)}")
    templates = reader.json(find(folder, "templates.json"), dict)
    examples: list[Example] = []
    for name in names:
        template = templates.get(name)
        if not isinstance(template, str) or "{context}" not in template:
            raise ValueError(f"uncomp eval: {folder}/templates.json must hold a text with {{context}} for {name}")
        path, made = find(folder, f"{name}.jsonl"), []
        for number, record in reader.lines(path, {"context": is_text, "input": is_string}, identity="id"):
            answers, offered = _list(record.get("answer")), _list(record.get("options"))
            if not answers:
                reader.refuse(path, number, "field 'answer' must be a string, a number or a list of them")
                continue
            made.append(_example(name, record, number, template, answers, offered, options))
        examples += made[: options.limit]
    return Source({"subsets": names}, lambda tokenizer, positions: examples)


def _list(value: Any) -> list[str]:
    """A string, a number or a list of them as strings."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [str(item) for item in items if isinstance(item, (str, int, float)) and str(item).strip()]


def _example(
    name: str,
    record: dict[str, Any],
    number: int,
    template: str,
    answers: list[str],
    offered: list[str],
    options: Options,
) -> Example:
    listed = "\n".join(f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(offered))
    text, ends = fill(template, {"context": record["context"], "input": record["input"], "options": listed})
    return Example(
        task="infinitebench",
        subset=name,
        id=str(record.get("id", number)),
        text=text,
        context_end=ends["context"],
        max_new_tokens=options.max_new_tokens or NEW_TOKENS.get(name, 32),
        metrics=(METRIC[name],),
        answers=answers,
        options=offered,
        evidence=answers if METRIC[name] in ("first_number", "among_words") else (),
    )
