# SPDX-License-Identifier: Apache-2.0
"""`uncomp eval TASK`: quality of policies and budgets on a benchmark's own files (docs/evaluation.md)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import uncomp
from uncomp.cli_eval_options import add_common, add_prompts, count, none_or_more, numbers
from uncomp.cli_options import add_command

DATA = {
    "longbench": "TASK.jsonl or base/TASK.jsonl, e/TASK_e.jsonl, and config/dataset2prompt.json, dataset2maxlen.json",
    "needle": "PaulGrahamEssays/*.txt and needles.json",
    "ruler": "PaulGrahamEssays/*.txt, or files of prompts",
    "gsm8k": "test*.jsonl, and train*.jsonl for --shots",
    "infinitebench": "passkey.jsonl, ... and templates.json",
    "perplexity": "one UTF-8 text file",
}


def add(commands: Any) -> None:
    """Adds the command to what argparse's add_subparsers returned."""
    text = "Scores policies and budgets on a benchmark."
    evaluate = add_command(commands, "eval", text)
    tasks = evaluate.add_subparsers(metavar="TASK", required=True)
    for name, files in DATA.items():
        parser = tasks.add_parser(name, help=f"data: {files}", description=f"{text} Data: {files}.")
        parser.set_defaults(command=_perplexity if name == "perplexity" else _generating, task=name)
        add_common(parser)
        if name == "perplexity":
            parser.add_argument("--prefix", type=count, default=4096, metavar="A", help="tokens; default %(default)s")
            parser.add_argument("--continuation", type=count, default=512, metavar="C", help="default %(default)s")
            parser.add_argument("--mode", choices=("stepwise", "chunk"), default="stepwise", help="how C is fed")
            continue
        add_prompts(parser)
        if name == "longbench":
            parser.add_argument("--e", action="store_true", help="LongBench-E")
            parser.add_argument("--hub", metavar="REPO", help="records through the datasets package")
        if name == "gsm8k":
            parser.add_argument("--shots", type=none_or_more, default=0, metavar="K", help="worked examples; default 0")
        if name in ("needle", "ruler"):
            parser.add_argument("--length", type=count, action="append", metavar="N", help="prompt tokens; repeatable")
        if name == "needle":
            parser.add_argument("--depths", type=numbers, metavar="D,D,...", help="per cent; default 0,11,...,100")
        if name == "ruler":
            parser.add_argument("--samples", type=count, default=20, metavar="K", help="of a subset and length")


# ---- what both kinds of tasks need
def _runs(args: argparse.Namespace, modes: list[str]) -> list[Any]:
    from uncomp.eval import runs

    shared = {"decode": args.decode, "window": args.window, "pool_width": args.pool_width, "profile": args.profile}
    return runs.plan(
        args.policy or ["uncomp"],
        args.budget or [384],
        modes,
        seed=args.seed,
        skip_sliding=args.skip_sliding,
        shared={name: value for name, value in shared.items() if value is not None},
    )


def _load(args: argparse.Namespace, processes: Any, progress: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and what of them a run's record says."""
    import torch

    from uncomp.calibration.fingerprint import model_hash
    from uncomp.eval.folder import commit
    from uncomp.eval.weights import weights_hash
    from uncomp.hf.environment import best_device, best_dtype, environment, quiet
    from uncomp.hf.load import load_model

    device = best_device(args.device)
    if device == "cuda" and processes.count > 1:
        device = f"cuda:{processes.local % torch.cuda.device_count()}"
    quiet(silent=not progress.shown)
    progress("loading")
    started = time.perf_counter()
    model, tokenizer = load_model(args.model, dtype=best_dtype(args.dtype, device), device=device)
    loading = time.perf_counter() - started
    text = model.config.get_text_config(decoder=True)
    about = {
        "model": str(args.model),
        "model_type": text.model_type,
        "versions": {
            "uncomp": uncomp.__version__,
            "commit": commit(),
            "torch": torch.__version__,
            "transformers": environment()["transformers"],
        },
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    dtype = str(model.dtype).removeprefix("torch.")
    decides = {"model": model_hash(text), "weights": weights_hash(model), "dtype": dtype}
    facts = {"about": about, "decides": decides, "positions": text.max_position_embeddings, "loading": loading}
    return model, tokenizer, facts


def _finish(
    args: argparse.Namespace,
    processes: Any,
    progress: Any,
    runs: Any,
    facts: dict[str, Any],
    reading: float,
    run_all: Any,
) -> int:
    """Runs all, prints the summaries, and where the time went, also of what was interrupted.

    Args:
        reading: seconds for data and prompts. run_all: (efforts) -> summaries.
    """
    from uncomp.eval.effort import Effort, line, total

    efforts, started = [Effort() for _ in runs], time.perf_counter()

    def tell() -> None:
        progress.clear()
        if processes.first:
            print(line(total(efforts), time.perf_counter() - started, facts["loading"], reading), file=sys.stderr)

    try:
        summaries = run_all(efforts)
    except KeyboardInterrupt:
        tell()
        raise
    tell()
    if processes.first:
        for values in summaries:
            print(json.dumps(values) if args.json else _line(values))
    return 0


def _line(values: dict[str, Any]) -> str:
    total = values["total"]
    budget = "" if values["budget"] is None else f" {values['budget']}"
    score = "-" if values["score"] is None else f"{values['score']:.2f}"
    cut = f"; {total['cut']} prompts were cut in the middle" if total.get("cut") else ""
    return (
        f"{values['policy']}{budget} {values['mode']}: score {score}, {total['n']} records, stored "
        f"{total['stored']['end']:.1f} tokens a row ({100 * total['stored']['share']:.2f} %){cut}"
    )


def _guarded(command: Any) -> Any:
    """A run that failed for no fault of its arguments ends with status 1 and one line."""

    def run(args: argparse.Namespace, progress: Any) -> int:
        from uncomp.eval.folder import RunFailure
        from uncomp.eval.processes import Processes

        processes = Processes()
        try:
            return command(args, progress, processes)
        except RunFailure as error:
            progress.clear()
            print(" ".join(str(error).split()), file=sys.stderr)
            return 1
        finally:
            processes.leave()

    return run


# ---- commands
@_guarded
def _generating(args: argparse.Namespace, progress: Any, processes: Any) -> int:
    from uncomp.eval import runner
    from uncomp.eval.reading import Reader
    from uncomp.eval.task import Settings, Task
    from uncomp.eval.tasks import TASKS, Options

    def say(text: str) -> None:
        if processes.first:
            progress.clear()
            print(text, file=sys.stderr)

    if args.teacher_forced and "agnostic" in (args.question or ()):
        raise ValueError("uncomp eval: --teacher-forced compresses the whole prompt; it needs --question aware")
    runs = _runs(args, args.question or ["aware"])  # bad arguments and bad data are told before the model is loaded
    reader = Reader(skip_bad=args.skip_bad, on_skip=say)
    options = Options(
        data=Path(args.data),
        subsets=args.subset,
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
        e=getattr(args, "e", False),
        hub=getattr(args, "hub", None),
        shots=getattr(args, "shots", 0),
        lengths=getattr(args, "length", None),
        depths=getattr(args, "depths", None),
        samples=getattr(args, "samples", 20),
        seed=args.seed,
    )
    started = time.perf_counter()
    source = TASKS[args.task](options, reader)
    reading = time.perf_counter() - started
    model, tokenizer, facts = _load(args, processes, progress)
    started = time.perf_counter()
    examples = source.examples(tokenizer, facts["positions"])
    reading += time.perf_counter() - started
    settings = Settings(
        out=Path(args.out) / args.task,
        batch_size=args.batch_size,
        chat=args.chat,
        max_prompt=args.max_prompt,
        resume=args.resume,
        compare=Path(args.compare) if args.compare else None,
        per_row=args.per_row,
        teacher_forced=args.teacher_forced,
        skip_bad=args.skip_bad,
        common={
            "task": args.task,
            **facts["decides"],
            "settings": source.settings,
            "data": {Path(path).name: digest for path, digest in reader.sha256.items()},
            "chat": args.chat,
            "max_prompt": args.max_prompt,
            "max_new_tokens": args.max_new_tokens,
        },
        about={**facts["about"], "options": _options(args), "files": reader.sha256, "bad_lines": len(reader.skipped)},
        rounds=args.rounds,
    )
    task = Task(tokenizer, examples, settings, facts["positions"])
    reading += task.tokenise(processes.rank, processes.count)

    def run_all(efforts: Any) -> Any:
        return runner.run_all(model, task, runs, processes, progress, say, efforts)

    return _finish(args, processes, progress, runs, facts, reading, run_all)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name != "command"}


@_guarded
def _perplexity(args: argparse.Namespace, progress: Any, processes: Any) -> int:
    from uncomp.eval import continuations
    from uncomp.eval.reading import Reader

    runs = _runs(args, ["agnostic"])
    reader, path = Reader(), Path(args.data)
    text = reader.text(path)
    model, tokenizer, facts = _load(args, processes, progress)
    if args.prefix + args.continuation >= facts["positions"]:
        raise ValueError(
            f"uncomp eval: --prefix and --continuation must stay below the model's {facts['positions']} positions; "
            f"got {args.prefix} and {args.continuation}"
        )
    started = time.perf_counter()
    sizes = {"prefix": args.prefix, "continuation": args.continuation, "count": args.limit or 16, "mode": args.mode}
    pieces = continuations.cut(tokenizer, path, text, **sizes)
    common = {
        "task": args.task,
        **facts["decides"],
        "settings": sizes,
        "data": {Path(name).name: digest for name, digest in reader.sha256.items()},
    }
    reading = time.perf_counter() - started
    folders = [run.folder(Path(args.out) / args.task, common) for run in runs]
    about = {**facts["about"], "options": _options(args), "files": reader.sha256}
    how = {"resume": args.resume, "processes": processes, "progress": progress}

    def run_all(efforts: Any) -> Any:
        return continuations.run_all(model, pieces, runs, folders, about, **how, efforts=efforts)

    return _finish(args, processes, progress, runs, facts, reading, run_all)
