# SPDX-License-Identifier: Apache-2.0
"""LongBench and LongBench-E: English tasks from the benchmark's own JSON Lines files and its own templates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from uncomp.eval import hub
from uncomp.eval.prompts import Example, fill
from uncomp.eval.reading import Reader, are_strings, is_string, is_text, is_whole
from uncomp.eval.tasks.base import Options, Source, find

METRIC = {
    "narrativeqa": "qa_f1",
    "qasper": "qa_f1",
    "multifieldqa_en": "qa_f1",
    "hotpotqa": "qa_f1",
    "2wikimqa": "qa_f1",
    "musique": "qa_f1",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "trec": "class",
    "triviaqa": "qa_f1",
    "samsum": "rouge_l",
    "passage_count": "count",
    "passage_retrieval_en": "retrieval",
    "lcc": "edit_sim",
    "repobench-p": "edit_sim",
}
NOT_IN_E = ("narrativeqa", "musique", "qmsum")
CONTINUATIONS = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")  # no chat frame
ONE_LINE = ("trec", "triviaqa", "samsum")
BUCKETS = ((4000, "0-4k"), (8000, "4-8k"), (None, "8k+"))  # words


def read(options: Options, reader: Reader) -> Source:
    """Reads `base/TASK.jsonl` (or `TASK.jsonl`), with `--e` `e/TASK_e.jsonl`, and the two files under `config/`.

    With `--hub` the records come through the `datasets` package, the two files still from the folder.

    Raises:
        ValueError: a missing file, an unknown task, a bad line, by file and line.
        ImportError: `--hub` without that package.
    """
    folder = options.folder("longbench")
    names = options.chosen("longbench", [n for n in METRIC if not (options.e and n in NOT_IN_E)])
    prompts = reader.json(find(folder, "config/dataset2prompt.json"), dict)
    lengths = reader.json(find(folder, "config/dataset2maxlen.json"), dict)
    examples: list[Example] = []
    for name in names:
        for table, kind, file in ((prompts, str, "dataset2prompt"), (lengths, int, "dataset2maxlen")):
            if not isinstance(table.get(name), kind):
                raise ValueError(f"uncomp eval: {folder}/config/{file}.json has no entry for {name}")
        if lengths[name] is True or lengths[name] < 1:
            raise ValueError(
                f"uncomp eval: {folder}/config/dataset2maxlen.json: {name} must be at least 1; got {lengths[name]}"
            )
        if "{context}" not in prompts[name]:
            raise ValueError(f"uncomp eval: {folder}/config/dataset2prompt.json: {name} has no {{context}}")
        if options.hub is not None:
            file = hub.fetch(options.hub, f"{name}_e" if options.e else name)
        else:
            file = find(folder, f"e/{name}_e.jsonl", f"{name}_e.jsonl") if options.e else _base(folder, name)
        examples += _examples(name, file, prompts[name], lengths[name], options, reader)
    return Source({"subsets": names, "e": options.e}, lambda tokenizer, positions: examples)


def _base(folder: Path, name: str) -> Path:
    return find(folder, f"base/{name}.jsonl", f"{name}.jsonl", f"data/{name}.jsonl")


def _examples(name: str, file: Path, template: str, most: int, options: Options, reader: Reader) -> list[Example]:
    fields = {"context": is_text, "input": is_string, "answers": are_strings, "length": is_whole}
    if METRIC[name] == "class":
        fields["all_classes"] = are_strings
    made = []
    for number, record in reader.lines(file, fields, identity="_id"):
        named = (field for field in re.findall(r"\{(\w+)\}", template) if not is_string(record.get(field, "")))
        if (wrong := next(named, None)) is not None:
            reader.refuse(file, number, f"field '{wrong}' must be a string, because the template has {{{wrong}}}")
            continue
        made.append(_example(name, record, number, template, options.max_new_tokens or most))
    return made[: options.limit]


def _example(name: str, record: dict[str, Any], number: int, template: str, most: int) -> Example:
    text, ends = fill(template, record)
    words = record["length"]
    bucket = next(label for limit, label in BUCKETS if limit is None or words < limit)
    return Example(
        task="longbench",
        subset=name,
        id=str(record.get("_id") or number),
        text=text,
        context_end=ends["context"],
        max_new_tokens=most,
        metrics=(METRIC[name],),
        answers=record["answers"],
        chat=name not in CONTINUATIONS,
        one_line=name in ONE_LINE,
        classes=record.get("all_classes") or (),
        evidence=[] if METRIC[name] in ("rouge_l", "edit_sim", "class") else record["answers"],
        details={"words": words, "bucket": bucket},
    )
