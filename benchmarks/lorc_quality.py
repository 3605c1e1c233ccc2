# SPDX-License-Identifier: Apache-2.0
"""What keys and values of low rank lose, alone and under eviction: loss of continuations, needles, LongBench.

    python benchmarks/lorc_quality.py --model DIR --text FILE --calibrate FILE --needle DIR --longbench DIR --json F
    python benchmarks/lorc_quality.py --merge F ...

One row a share of channels, schedule of the ranks and kind of factors, behind one of the model as it is; each with the
full cache and with `uncomp` at a share of the tokens, over the same prompts. The model is loaded, prompts are tokenised
and calibration tokens are run once. `--share 2/3` takes a third of the rows: what several processes measured is one
table again by `--merge`. Schedules that give the same ranks are measured once. The JSON file is written behind every
number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from lorc_measured import DEPTHS, Measure, tokens_of
from lorc_table import merged, table
from run import commit

from uncomp import lorc
from uncomp.eval import perplexity

SCHEDULES = ("cumulative_condition", "uniform", "linear")
KINDS = ("whitened", "plain")
SUBSETS = ("multifieldqa_en", "hotpotqa", "2wikimqa", "triviaqa", "trec", "lcc")  # answers of at most 64 tokens


def pieces_of(ids: Tensor, samples: int, seqlen: int) -> Tensor:
    """[samples, seqlen] int64, evenly spread over ids [N]."""
    pairs = perplexity.windows(ids, seqlen - 2, 2, samples)
    return torch.cat([torch.cat(pair, 1) for pair in pairs])


def grid(options: argparse.Namespace) -> list[dict[str, Any] | None]:
    """What is measured, in this order; None is the model as it is. A share has every n-th place, with all schedules."""
    kinds = [kind for kind in options.factors if kind == "plain" or options.calibrate is not None]
    states: list[list[dict[str, Any] | None]] = [[None]]
    for kind, grain, rho in itertools.product(kinds, options.granularity, options.rho):
        rest = {"factors": kind, "granularity": grain}
        states.append([{"rho": rho, "schedule": schedule, **rest} for schedule in options.schedules])
    part, of = options.share
    return list(itertools.chain(*states[part - 1 :: of]))


def config_of(state: dict[str, Any]) -> lorc.LorcConfig:
    """The configuration of a row."""
    fields = {name: state[name] for name in ("rho", "schedule", "granularity")}
    return lorc.LorcConfig(**fields, whiten="calib" if state["factors"] == "whitened" else None)


def rows(
    model: Any, measure: Measure, calibration: Tensor | None, options: argparse.Namespace, deadline: float
) -> Iterator[dict]:
    """Rows, each several times: as it is after every number.

    Args:
        calibration: [samples, seqlen] tokens for whitened factors; None: plain ones alone.
        options: of the command. deadline: of `time.monotonic`, behind which no part begins.
    """
    held: dict[str, lorc.Calibration] = {}
    done: dict[tuple, dict] = {}  # rows by what makes their factors
    for state in grid(options):
        if time.monotonic() > deadline:
            return
        row: dict[str, Any] = {"rho": None} if state is None else dict(state)
        began, handle = time.perf_counter(), nullcontext()
        if state is not None:
            config, grain = config_of(state), state["granularity"]
            if config.whiten and grain not in held:
                assert calibration is not None
                held = {grain: lorc.calibrate(model, calibration, granularity=grain)}
                row["calibration_seconds"] = time.perf_counter() - began
                began = time.perf_counter()
            handle = lorc.compress(model, config, calibration=held[grain] if config.whiten else None)
            row["compress_seconds"] = time.perf_counter() - began
            stats = handle.stats()
            row |= {name: stats[name] for name in ("kept_share", "rank_k", "rank_v")}
            same = (state["factors"], grain, *row["rank_k"], 0, *row["rank_v"])
            if same in done:
                handle.remove()
                yield {**done[same], **state, "same_ranks_as": done[same]["schedule"]}
                continue
        name = "as-it-is" if state is None else "-".join(str(state[key]).replace(":", "_") for key in state)
        with handle, torch.no_grad():
            for part, number in measure.parts(name, state is None or state["granularity"] == "head"):
                if time.monotonic() > deadline:
                    row["stopped_before"] = part
                    if "full" in row:
                        yield row
                    return
                for way, values in number().items():
                    row.setdefault(way, {}).update(values)
                row["seconds"] = time.perf_counter() - began
                yield row
        if state is not None:
            done[same] = row


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="print one table of such files, and end")
    parser.add_argument("--model", help="folder, .gguf file or name")
    parser.add_argument("--text", type=Path, help="UTF-8 file to cut prefixes and continuations from")
    parser.add_argument("--calibrate", type=Path, help="UTF-8 file for whitened factors; without it plain ones alone")
    parser.add_argument("--needle", type=Path, metavar="DIR", help="data of `uncomp eval needle`")
    parser.add_argument("--longbench", type=Path, metavar="DIR", help="data of `uncomp eval longbench`")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.575, 0.85, 0.7, 0.5])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--factors", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--granularity", nargs="+", default=["head"], help="head, group:S, layer")
    parser.add_argument(
        "--share", type=_share, default=(1, 1), metavar="I/N", help="of the rows, for one of N processes"
    )
    parser.add_argument("--budget", type=float, default=0.0938, help="share of the tokens that uncomp keeps")
    parser.add_argument("--prefix", type=int, default=3584)
    parser.add_argument("--continuation", type=int, default=128)
    parser.add_argument("--windows", type=int, default=6, help="continuations that are scored")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096], help="of prompts with a needle")
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS), help="per cent, of needles")
    parser.add_argument("--subsets", nargs="+", default=list(SUBSETS), help="of LongBench")
    parser.add_argument("--limit", type=int, default=2, help="records of each subset")
    parser.add_argument("--max-prompt", type=int, default=7500, help="tokens; longer ones are cut in the middle")
    parser.add_argument("--batch-size", type=int, default=6, help="of generated answers")
    parser.add_argument("--samples", type=int, default=32, help="pieces of the calibration text")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens of such a piece")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto", help="auto (default), float32, float16, bfloat16")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which nothing begins")
    parser.add_argument("--out", type=Path, help="new folder for the records of generated answers; default: none stay")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.merge is None and options.model is None:
        parser.error("--model or --merge is needed")
    if options.merge is None and not (options.text or options.needle or options.longbench):
        parser.error("one of --text, --needle and --longbench is needed: there is nothing to measure")
    return options


def _share(text: str) -> tuple[int, int]:
    part, _, of = text.partition("/")
    if not (part.isdigit() and of.isdigit() and 0 < int(part) <= int(of)):
        raise argparse.ArgumentTypeError(f"must be I/N, with I from 1 to N; got {text}")
    return int(part), int(of)


def _plain(value: Any) -> Any:
    """A value of the command line as JSON takes it."""
    return str(value) if isinstance(value, Path) or value == float("inf") else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and after each number what has been measured so far to the JSON file."""
    began, options = time.monotonic(), parse(arguments)
    if options.merge is not None:
        print(table(merged([json.loads(path.read_text()) for path in options.merge])))
        return 0
    import transformers

    from uncomp.hf.environment import best_device, best_dtype, quiet
    from uncomp.hf.load import load_model

    quiet(silent=True)
    device = best_device(options.device)
    model, tokenizer = load_model(options.model, dtype=best_dtype(options.dtype, device), device=device)
    calibration = None
    if options.calibrate is not None:
        calibration = pieces_of(tokens_of(tokenizer, options.calibrate), options.samples, options.seqlen)
    with tempfile.TemporaryDirectory() as temporary:
        measure = Measure(model, tokenizer, options, options.out or Path(temporary))
        shared = {
            "model": str(options.model),
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
            "dtype": str(model.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit(),
            "options": {key: _plain(value) for key, value in vars(options).items() if value is not None},
            "ready_seconds": time.monotonic() - began,
        }
        found: list[dict] = []
        for row in rows(model, measure, calibration, options, began + options.deadline):
            if not found or found[-1]["row"] is not row:
                found.append({"row": row})
            if options.json is not None:
                beside = options.json.with_suffix(f".{os.getpid()}.part")
                beside.write_text(json.dumps([{**shared, **each["row"]} for each in found], indent=1) + "\n")
                beside.replace(options.json)
            last = found[-1]["row"]
            print(table([last]).splitlines()[-1], f"{last['seconds']:.1f} s", file=sys.stderr, flush=True)
    print(table([each["row"] for each in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
