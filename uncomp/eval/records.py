# SPDX-License-Identifier: Apache-2.0
"""The record of one example under one run: docs/evaluation.md "What a record tells"."""

from __future__ import annotations

from typing import Any

from uncomp.eval.agreement import agreement
from uncomp.eval.batch import Outcome
from uncomp.eval.metrics import Case
from uncomp.eval.metrics_infinitebench import named_choice
from uncomp.eval.prompts import Example, Prompt
from uncomp.eval.runs import Run
from uncomp.eval.scores import score


def make_record(
    run: Run,
    index: int,
    example: Example,
    prompt: Prompt,
    outcome: Outcome,
    text: str,
    full: dict[str, Any] | None,
    *,
    per_row: bool,
) -> dict[str, Any]:
    """Plain JSON values, all but the place in its batch.

    Args:
        index: of the example in its task.
        text: of the new tokens.
        full: tokens and prediction of the full cache's record; None where there is none.
        per_row: tell the stored tokens of every row.
    """
    details = example.details
    case = Case(
        answers=example.answers,
        classes=example.classes,
        stem=details.get("stem", ""),
        needle=details.get("needle", ""),
        seed=f"{run.config.seed}:{example.id}",
        options=example.options,
        until=details.get("until", ""),
    )
    compressed = prompt.boundary if run.mode == "agnostic" else len(prompt.ids)
    flat = [n for layer in outcome.per_row for n in layer]
    stored: dict[str, Any] = {
        "mean": sum(flat) / len(flat),
        "min": min(flat),
        "max": max(flat),
        "end": outcome.end,
        "per_layer": [round(sum(layer) / len(layer), 2) for layer in outcome.per_row],
    }
    if outcome.context is not None:
        stored["context"] = outcome.context
    if per_row:
        stored["per_row"] = outcome.per_row
    record = {
        "task": example.task,
        "subset": example.subset,
        "id": example.id,
        "index": index,
        "prompt_tokens": len(prompt.ids),
        "cut_tokens": prompt.cut,
        "new_tokens": len(outcome.tokens),
        "prediction": text,
        "tokens": outcome.tokens,
        "answers": list(example.answers),
        "score": {name: score(name, text, case, one_line=example.one_line) for name in example.metrics},
        "stored": stored,
        "bytes": outcome.bytes,
        "seconds": {"prefill": outcome.prefill_seconds, "decode": outcome.decode_seconds},
        "uncompressed": isinstance(run.budget, int) and compressed <= run.budget,
        "details": dict(details),
    }
    if "choice" in example.metrics:
        record["guessed"] = named_choice(text, case) is None
    if outcome.kept is not None:
        record["evicted_answer"] = outcome.kept.evicted
        record["head_consensus"] = outcome.kept.consensus
    if full:
        record["agreement"] = agreement(outcome.tokens, text, full["tokens"], full["prediction"])
    return record
