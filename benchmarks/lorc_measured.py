# SPDX-License-Identifier: Apache-2.0
"""What a model is worth as it is now: loss of continuations, needles and a share of LongBench, with the full cache and
with a compressed one. Texts and prompts are read and tokenised once, for any number of states of the model.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uncomp.eval import perplexity, runner, runs
from uncomp.eval.effort import Effort
from uncomp.eval.folder import read_records
from uncomp.eval.processes import Processes
from uncomp.eval.reading import Reader
from uncomp.eval.summary import by_subset, first_score
from uncomp.eval.task import Settings, Task
from uncomp.eval.tasks import TASKS, Options

DEPTHS = (0, 20, 40, 60, 80, 100)


class Quiet:
    """Progress that is not shown."""

    label = ""

    def __call__(self, text: str) -> None:
        """Nothing."""


def tokens_of(tokenizer: Any, path: Path) -> Tensor:
    """[N] int64 of a UTF-8 file."""
    text = path.read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)


class Measure:
    """Texts and prompts of one model.

    Args:
        options: of the command; `text`, `needle` and `longbench` may be None: that part is left out.
        out: folder of the records of generated answers, one for each state of the model.
    """

    def __init__(self, model: Any, tokenizer: Any, options: argparse.Namespace, out: Path) -> None:
        self._model, self._options, self._out = model, options, out
        self._pieces = []
        if options.text is not None:
            ids = tokens_of(tokenizer, options.text)
            self._pieces = perplexity.windows(ids, options.prefix, options.continuation, options.windows)
        positions = model.config.get_text_config(decoder=True).max_position_embeddings
        settings = Settings(
            out=out,
            batch_size=options.batch_size,
            chat="auto",
            max_prompt=options.max_prompt,
            resume=False,
            compare=None,
            per_row=False,
            teacher_forced=False,
            skip_bad=False,
            common={},
            about={},
        )
        self._tasks: dict[str, Task] = {}
        for task, more in (
            ("needle", {"lengths": options.lengths, "depths": options.depths}),
            ("longbench", {"subsets": options.subsets, "limit": options.limit}),
        ):
            folder = getattr(options, task)
            if folder is not None:
                source = TASKS[task](Options(data=folder, seed=options.seed, **more), Reader())
                common = {"task": task, "model": str(options.model), "settings": source.settings}
                examples = source.examples(tokenizer, positions)
                self._tasks[task] = Task(tokenizer, examples, replace(settings, common=common), positions)

    def parts(self, name: str, heads_apart: bool) -> Iterator[tuple[str, Callable[[], dict[str, dict[str, Any]]]]]:
        """What there is to measure: name of a part, and what measures it and gives numbers by way.

        Args:
            name: of the model's state, a folder's name. heads_apart: rows of the cache are heads, which uncomp needs.
        """
        ways = ["full", "uncomp"] if heads_apart else ["full"]
        planned = {way: runs.plan([way], [self._options.budget], ["aware"], seed=self._options.seed)[0] for way in ways}
        if self._pieces:
            for way in ways:
                yield f"perplexity {way}", lambda way=way: {way: self._perplexity(planned[way])}
        for task in self._tasks:
            yield task, lambda task=task: self._answers(task, planned, name)

    def _perplexity(self, run: runs.Run) -> dict[str, Any]:
        began = time.perf_counter()
        config = runs.with_room(run.config, self._options.continuation)
        with perplexity.Probe(self._model, config) as probe:
            texts = [probe.score(*piece) for piece in self._pieces]
            steps = probe.steps()
        loss = statistics.fmean(text.loss for text in texts)
        return {
            "loss": loss,
            "perplexity": math.exp(loss),
            "losses": [text.loss for text in texts],
            "stored_tokens": texts[0].stored_tokens_mean,
            "kv_bytes": texts[0].bytes["kv"],
            "perplexity_seconds": time.perf_counter() - began,
            "perplexity_steps": steps,
        }

    def _answers(self, task: str, planned: dict[str, runs.Run], name: str) -> dict[str, dict[str, Any]]:
        began, work = time.perf_counter(), self._tasks[task]
        common = {**work.settings.common, "factors": name}
        work.settings = replace(work.settings, out=self._out / name / task, common=common)
        efforts = [Effort() for _ in planned]
        quiet = lambda text: None  # noqa: E731
        runner.run_all(self._model, work, list(planned.values()), Processes(), Quiet(), quiet, efforts)
        found: dict[str, dict[str, Any]] = {}
        for (way, run), effort in zip(planned.items(), efforts, strict=True):
            records = read_records(run.folder(work.settings.out, common).path)
            scores = {f"{record['subset']}/{record['id']}": first_score(record) for record in records}
            found[way] = {f"{task}_records": scores, f"{task}_effort": effort.to_dict()}
            if task == "needle":
                found[way] |= {"found": round(sum(scores.values())), "needles": len(scores)}
                continue
            subsets = {key: 100 * statistics.fmean(map(first_score, some)) for key, some in by_subset(records).items()}
            found[way] |= {"longbench": statistics.fmean(subsets.values()), "longbench_subsets": subsets}
        found["full"][f"{task}_seconds"] = time.perf_counter() - began
        return found
