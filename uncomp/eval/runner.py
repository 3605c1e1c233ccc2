# SPDX-License-Identifier: Apache-2.0
"""Runs a generating task: several policies and budgets over the same prompts, one model, records as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from uncomp.eval import batch as batches
from uncomp.eval import summary
from uncomp.eval.agreement import teacher_forced
from uncomp.eval.compared import Compared
from uncomp.eval.effort import Effort, total
from uncomp.eval.folder import SUMMARY, RunFolder, write_json
from uncomp.eval.processes import Processes
from uncomp.eval.records import make_record
from uncomp.eval.runs import Run, with_room
from uncomp.eval.task import Task
from uncomp.patching import check, patch

Progress = Callable[[str], None]


def end_tokens(model: torch.nn.Module) -> tuple[int, ...]:
    """Ids that end a text, as the model says."""
    eos = model.generation_config.eos_token_id
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def run_all(
    model: torch.nn.Module,
    task: Task,
    runs: Sequence[Run],
    processes: Processes,
    progress: Progress,
    say: Callable[[str], None],
    efforts: Sequence[Effort],
) -> list[dict[str, Any]]:
    """Every run of a call, one behind the other.

    Args:
        model: not patched; it is not patched afterwards either.
        task: examples and settings.
        runs: what `runs.plan` gave.
        progress: shows one line. say: prints a line that stays, about a record left out.
        efforts: of each run; what this process spends is added as it goes.
    Returns:
        the summaries, in the order of the runs, the same in every process.
    Raises:
        ValueError: a folder that holds other results, an example that makes no prompt.
        RunFailure: a disk that is full, a process that failed.
    """
    for run in runs:
        check(model, run.config)  # before anything is written
    skipped = _leave_out(task, runs, processes, say)
    wanted = [i for i in range(len(task.examples)) if i not in skipped]
    if not wanted:
        raise ValueError(f"uncomp eval: no record is left to run: {len(skipped)} make no prompt")
    folders = [run.folder(task.settings.out, task.settings.common) for run in runs]
    settings = task.settings
    compared = Compared(settings.out, settings.compare, runs, folders, processes, say, needed=settings.teacher_forced)
    done = [
        processes.from_first(lambda f=f, r=r: f.open(_about(task, r, processes), resume=task.settings.resume))
        for f, r in zip(folders, runs, strict=True)
    ]
    rounds, made = settings.rounds, []
    for part in range(rounds):
        full: dict[str, Any] = {}  # records to compare with, by question mode
        share = wanted[part::rounds]
        for run, folder, finished, effort in zip(runs, folders, done, efforts, strict=True):
            progress.label = run.name if rounds == 1 else f"{run.name}, round {part + 1}/{rounds}"
            mine = [i for i in share if task.keys[i] not in finished][processes.rank :: processes.count]
            began, failure = time.perf_counter(), None
            if run.config.policy != "full" and run.mode not in full:
                full[run.mode] = compared.records(run.mode)
            try:
                _run(model, task, run, folder, mine, full.get(run.mode), processes.rank, progress, effort)
            except Exception as error:
                if processes.count == 1:
                    raise
                failure = f"{type(error).__name__}: {error}"
            finally:
                effort.seconds += time.perf_counter() - began
            processes.settle(failure)
            if part == rounds - 1:
                spent = total(processes.gather(effort))
                keys = [task.keys[i] for i in wanted]
                closing = (run, folder, keys, len(skipped), spent)
                made.append(processes.from_first(lambda closing=closing: _close(*closing)))
    return made


def _close(run: Run, folder: RunFolder, keys: Sequence[str], skipped: int, spent: Effort) -> dict[str, Any]:
    """The summary of a run that is done, written beside its records in order."""
    values = summary.of_run(run, folder.merge(keys), skipped=skipped, effort=spent)
    write_json(folder.path / SUMMARY, values)
    return values


def _about(task: Task, run: Run, processes: Processes) -> dict[str, Any]:
    return {
        **task.settings.about,
        "policy": run.policy,
        "budget": run.budget,
        "batch_size": task.settings.batch_size,
        "processes": processes.count,
        "records": len(task.examples),
    }


def _leave_out(task: Task, runs: Sequence[Run], processes: Processes, say: Callable[[str], None]) -> set[int]:
    """Indices of examples that make no prompt; each process looks at its own."""
    bad: dict[int, str] = {}
    agnostic = any(run.mode == "agnostic" for run in runs)
    for index in range(processes.rank, len(task.examples), processes.count):
        try:
            prompt = task.prompt(index)
            if agnostic and not 0 < prompt.boundary < len(prompt.ids):
                raise ValueError(
                    f"uncomp eval: {task.keys[index]}: --question agnostic needs a context and a question behind it"
                )
        except ValueError as error:
            bad[index] = str(error)
            if not task.settings.skip_bad:
                break
    found = {index: text for part in processes.gather(bad) for index, text in part.items()}
    if found and not task.settings.skip_bad:
        raise ValueError(found[min(found)])
    for index in sorted(found) if processes.first else ():
        say(found[index])
    return set(found)


def _run(
    model: torch.nn.Module,
    task: Task,
    run: Run,
    folder: RunFolder,
    indices: Sequence[int],
    compared: dict[str, dict[str, Any]] | None,
    rank: int,
    progress: Progress,
    effort: Effort,
) -> None:
    """This process's share of one run; the model is patched once, but for `teacher_forced`."""
    if not indices:
        return
    eos = end_tokens(model)
    pad = task.tokenizer.pad_token_id
    pad = pad if pad is not None else eos[0] if eos else 0
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    started, finished = time.perf_counter(), 0
    config = with_room(run.config, max(task.examples[i].max_new_tokens for i in indices))
    forced = task.settings.teacher_forced and compared is not None
    even = run.mode == "agnostic" and config.skip_sliding
    groups = task.batches(indices, task.settings.batch_size, even=even)
    handle = None
    try:
        for number, group in enumerate(groups):
            _show(progress, finished, len(indices), started)
            if handle is None:
                handle = patch(model, config)
                effort.patches += 1
            with effort.until_broken_off():
                outcomes = batches.run(
                    model,
                    handle,
                    [task.prompt(i) for i in group],
                    max_new_tokens=task.examples[group[0]].max_new_tokens,
                    agnostic=run.mode == "agnostic",
                    pad=pad,
                    eos=eos,
                )
            effort.model_seconds += sum(o.prefill_seconds + o.decode_seconds for o in outcomes)
            if forced:  # the full cache's logits come from the model as it is
                effort.count(handle.steps())
                handle.remove()
                handle = None
            made = []
            for i, outcome in zip(group, outcomes, strict=True):
                example, prompt = task.examples[i], task.prompt(i)
                full = compared and compared.get(task.keys[i])
                text = task.tokenizer.decode(outcome.tokens, skip_special_tokens=True)
                record = make_record(run, i, example, prompt, outcome, text, full, per_row=task.settings.per_row)
                if forced and full:
                    with effort.in_model():
                        record["agreement"] |= teacher_forced(model, prompt.ids, full["tokens"], config)
                place = {"batch": {"number": number, "size": len(group)}, "warmup": number == 0}
                made.append({**record, "config": folder.hash, **place})
            folder.append(rank, made)
            finished += len(group)
            effort.records += len(group)
        if handle is not None:
            effort.count(handle.steps())
    finally:
        if handle is not None:
            handle.remove()
    if on_gpu:
        effort.peak = max(effort.peak, torch.cuda.max_memory_allocated(model.device))


def _show(progress: Progress, finished: int, total: int, started: float) -> None:
    passed = time.perf_counter() - started
    text = f"{finished}/{total} records"
    if finished:
        left = int(passed / finished * (total - finished))
        text += f", {finished / passed:.2f} records/s, {left // 60}:{left % 60:02d} left"
    progress(text)
