# SPDX-License-Identifier: Apache-2.0
"""What keys and values of low rank lose, alone and under eviction: loss of continuations, and needles in prefixes.

    python benchmarks/lorc_quality.py --model DIR --text FILE --calibrate FILE --json rows.json

One row a share of channels, schedule of the ranks and kind of factors, behind one of the model as it is; each with the
full cache and with `uncomp` at a share of the tokens, over the same pieces.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from prefill_quality import NUMBERS, haystack

from uncomp import UncompConfig, lorc
from uncomp.eval import perplexity

SCHEDULES = ("cumulative_condition", "uniform", "linear")


def pieces_of(ids: Tensor, samples: int, seqlen: int) -> Tensor:
    """[samples, seqlen] int64, evenly spread over ids [N]."""
    pairs = perplexity.windows(ids, seqlen - 2, 2, samples)
    return torch.cat([torch.cat(pair, 1) for pair in pairs])


def measured(model: Any, tokenizer: Any, ids: Tensor, options: argparse.Namespace, heads_apart: bool) -> dict:
    """Perplexity and needles of the model as it is now; with the full cache, and with uncomp where rows are heads."""
    pieces = perplexity.windows(ids, options.prefix, options.continuation, options.windows)
    depths = [(i + 0.5) / options.needles for i in range(options.needles)]
    asked = [
        haystack(ids, tokenizer, options.prefix, depth, NUMBERS[i % len(NUMBERS)]) for i, depth in enumerate(depths)
    ]
    configs = {"full": UncompConfig(policy="full", max_new_tokens=options.continuation)}
    if heads_apart:
        configs["uncomp"] = UncompConfig(budget=options.budget)
    found = {}
    for name, config in configs.items():
        with perplexity.Probe(model, config) as probe:
            texts = [probe.score(*piece) for piece in pieces]
            hits = [probe.score(*each) for each in asked]
        right = [
            bool((hit.log_probs.argmax(-1).cpu() == answer[0, 1:]).all())
            for hit, (_, answer) in zip(hits, asked, strict=True)
        ]
        loss = statistics.fmean(text.loss for text in texts)
        found[name] = {"loss": loss, "perplexity": math.exp(loss), "found": sum(right), "needles": len(right)}
        found[name]["stored_tokens"] = texts[0].stored_tokens_mean
        found[name]["losses"] = [text.loss for text in texts]
    return found


def rows(
    model: Any, tokenizer: Any, ids: Tensor, calibration: Tensor | None, options: argparse.Namespace
) -> Iterator[dict]:
    """Rows, each as soon as it is measured.

    Args:
        ids: [N] tokens of the text. calibration: [samples, seqlen] tokens for whitened factors; None: plain ones alone.
        options: of the command.
    """
    yield {"rho": None, **measured(model, tokenizer, ids, options, True)}
    kinds = ["plain"] if calibration is None else ["whitened", "plain"]
    for kind, grain, rho, schedule in itertools.product(kinds, options.granularity, options.rho, options.schedules):
        whiten = "calib" if kind == "whitened" else None
        config = lorc.LorcConfig(rho=rho, schedule=schedule, whiten=whiten, granularity=grain)
        begin = time.perf_counter()
        with lorc.compress(model, config, calibration=calibration if whiten else None) as handle:
            seconds, stats = time.perf_counter() - begin, handle.stats()
            yield {
                "rho": rho,
                "schedule": schedule,
                "factors": kind,
                "granularity": grain,
                "kept_share": stats["kept_share"],
                "rank_k": stats["rank_k"],
                "rank_v": stats["rank_v"],
                "compress_seconds": seconds,
                **measured(model, tokenizer, ids, options, grain == "head"),
            }


def table(found: Sequence[dict]) -> str:
    """Markdown."""
    ways = ("full", "uncomp")
    head = ["rho", "schedule", "factors of", "kept"]
    head += [f"{what}, {way}" for what in ("perplexity", "needles") for way in ways]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in found:
        cells = ["as it is", "", "", "100 %"]
        if row["rho"] is not None:
            kind = f"{row['factors']}, {row['granularity']}"
            cells = [f"{row['rho']:g}", row["schedule"], kind, f"{100 * row['kept_share']:.1f} %"]
        cells += [f"{row[way]['perplexity']:.2f}" if way in row else "" for way in ways]
        cells += [f"{row[way]['found']} of {row[way]['needles']}" if way in row else "" for way in ways]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and after each row what has been measured so far to the JSON file."""
    from uncomp.hf.environment import best_device, best_dtype
    from uncomp.hf.load import load_model

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder, .gguf file or name")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 file to cut prefixes from")
    parser.add_argument("--calibrate", type=Path, help="UTF-8 file for whitened factors; without it plain ones alone")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.85, 0.7, 0.575, 0.5])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--granularity", nargs="+", default=["head"], help="head, group:S, layer")
    parser.add_argument("--budget", type=float, default=0.0938, help="share of the tokens that uncomp keeps")
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--continuation", type=int, default=128)
    parser.add_argument("--windows", type=int, default=8, help="continuations that are scored")
    parser.add_argument("--needles", type=int, default=10, help="needles, at as many depths")
    parser.add_argument("--samples", type=int, default=32, help="pieces of the calibration text")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens of such a piece")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto", help="auto (default), float32, float16, bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = best_device(options.device)
    model, tokenizer = load_model(options.model, dtype=best_dtype(options.dtype, device), device=device)

    def tokens(path: Path) -> Tensor:
        text = path.read_text(encoding="utf-8")
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)

    calibration = None
    if options.calibrate is not None:
        calibration = pieces_of(tokens(options.calibrate), options.samples, options.seqlen)
    found = []
    for row in rows(model, tokenizer, tokens(options.text), calibration, options):
        found.append({**row, "model": options.model, "device": device})
        print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
