# SPDX-License-Identifier: Apache-2.0
"""Runs of the perplexity task: continuations after compressed prefixes, each beside the full cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uncomp.config import UncompConfig
from uncomp.eval.effort import Effort, total
from uncomp.eval.folder import SUMMARY, RunFolder, write_json
from uncomp.eval.perplexity import ContinuationScore, Probe, windows
from uncomp.eval.processes import Processes
from uncomp.eval.prompts import adds_bos, encode
from uncomp.eval.runs import Run, with_room
from uncomp.patching import check

TASK = "perplexity"
HELD_BYTES = 2**31  # of distributions of the full cache, on the model's device


@dataclass(frozen=True)
class Pieces:
    """What is scored.

    Fields:
        subset: name of the text. pairs: prefix [1, A] and continuation [1, C] of every window, int64.
        mode: how continuations are fed, see `perplexity.Probe`.
    """

    subset: str
    pairs: Sequence[tuple[Tensor, Tensor]]
    mode: str


def cut(tokenizer: Any, path: Path, text: str, *, prefix: int, continuation: int, count: int, mode: str) -> Pieces:
    """Windows of a text; a tokenizer that puts BOS in front of a text puts it in front of every prefix.

    Raises:
        ValueError: a text of fewer tokens than one window.
    """
    ids = torch.tensor(encode(tokenizer, text)[0])
    if ids.numel() < prefix + continuation:
        raise ValueError(
            f"uncomp eval: {path} must have at least {prefix + continuation} tokens (--prefix and --continuation); "
            f"got {ids.numel()}"
        )
    pairs = windows(ids, prefix, continuation, count)
    if adds_bos(tokenizer):
        bos = torch.tensor([[tokenizer.bos_token_id]])
        pairs = [(torch.cat([bos, begin], 1), rest) for begin, rest in pairs]
    return Pieces(path.stem, pairs, mode)


def run_all(
    model: torch.nn.Module,
    pieces: Pieces,
    runs: Sequence[Run],
    folders: Sequence[RunFolder],
    about: dict[str, Any],
    *,
    resume: bool,
    processes: Processes,
    progress: Any,
    efforts: Sequence[Effort],
) -> list[dict[str, Any]]:
    """Scores every window under every run, the full cache once a window.

    Windows come in blocks, of which the full cache's distributions fit in `HELD_BYTES` on the model's device. Within
    a block the model is patched once a run, so that all its windows replay one recorded step.

    Args:
        model: not patched. about: further values of run.json.
        efforts: of each run; what this process spends is added as it goes.
    Returns:
        the summaries, in the order of the runs.
    Raises:
        ValueError, RunFailure: as `runner.run_all`.
    """
    for run in runs:
        check(model, run.config)  # before anything is written
    done = [
        processes.from_first(lambda f=f, r=r: f.open({**about, "policy": r.policy, "budget": r.budget}, resume=resume))
        for f, r in zip(folders, runs, strict=True)
    ]
    keys = [f"{pieces.subset}/{index}" for index in range(len(pieces.pairs))]
    closed: dict[int, dict[str, Any]] = {}

    def close(i: int, spent: Effort) -> dict[str, Any]:
        values = summarise(runs[i], folders[i].merge(keys), spent)
        write_json(folders[i].path / SUMMARY, values)
        return values

    def finished(i: int) -> None:
        closed[i] = close(i, efforts[i])

    mine = range(processes.rank, len(pieces.pairs), processes.count)
    size, failure = _block(model, pieces), None
    blocks = [mine[i : i + size] for i in range(0, len(mine), size)]
    try:
        for block in blocks:
            alone = processes.count == 1 and block is blocks[-1]  # others may still be at work on the same run
            where = (runs, folders, done, efforts, processes.rank, progress)
            _block_of_windows(model, pieces, block, *where, finished if alone else None)
    except Exception as error:
        if processes.count == 1:
            raise
        failure = f"{type(error).__name__}: {error}"
    processes.settle(failure)
    gathered = processes.gather(list(efforts))
    for i in range(len(runs)):
        if i not in closed:
            spent = total(some[i] for some in gathered)
            closed[i] = processes.from_first(lambda i=i, spent=spent: close(i, spent))
    return [closed[i] for i in range(len(runs))]


def _block(model: torch.nn.Module, pieces: Pieces) -> int:
    """Windows of a block."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    widest = max((rest.shape[1] for _, rest in pieces.pairs), default=1)
    return max(1, HELD_BYTES // (4 * vocabulary * widest))


def _block_of_windows(
    model: torch.nn.Module,
    pieces: Pieces,
    block: Sequence[int],
    runs: Sequence[Run],
    folders: Sequence[RunFolder],
    done: Sequence[dict[str, Any]],
    efforts: Sequence[Effort],
    rank: int,
    progress: Any,
    finished: Callable[[int], None] | None,
) -> None:
    """Full first, then every run. The full cache's seconds are counted where it is a run, else in the first one.

    Args:
        finished: called with every run whose windows in this block are done.
    """
    still = [[n for n in block if f"{pieces.subset}/{n}" not in before] for before in done]
    needed = sorted({n for some in still for n in some})
    if not needed:
        return
    stock = UncompConfig(policy="full", budget=1.0)
    full: dict[int, ContinuationScore] = {}
    first = next((i for i, run in enumerate(runs) if run.config.policy == "full"), None)
    for i in [None, *(i for i in range(len(runs)) if i != first)]:
        place = first if i is None else i
        open_here = needed if i is None else still[i]
        effort = Effort() if place is None else efforts[place]
        if not open_here:
            continue
        started = time.perf_counter()
        room = max(pieces.pairs[n][1].shape[1] for n in open_here)
        config = with_room(stock if i is None else runs[i].config, room)
        effort.patches += 1
        try:
            with Probe(model, config, mode=pieces.mode) as probe:
                for n in open_here:
                    progress(f"window {n + 1}/{len(pieces.pairs)}, {'full cache' if i is None else runs[i].name}")
                    with effort.until_broken_off():
                        got = probe.score(*pieces.pairs[n])
                    if i is None:
                        full[n] = got
                    effort.model_seconds += got.prefill_seconds + got.decode_seconds
                    if place is not None and n in still[place]:
                        folder = folders[place]
                        warmup = n == open_here[0]
                        folder.append(rank, [_record(pieces, n, got, full[n], folder.hash) | {"warmup": warmup}])
                        effort.records += 1
                effort.count(probe.steps())
        finally:
            effort.seconds += time.perf_counter() - started
            if place is None:
                efforts[0].model_seconds += effort.model_seconds
                efforts[0].seconds += effort.seconds
        if finished is not None and place is not None:
            finished(place)


def _record(pieces: Pieces, index: int, got: ContinuationScore, full: ContinuationScore, config: str) -> dict[str, Any]:
    prefix, continuation = pieces.pairs[index]
    kl, equal = got.against(full)
    return {
        "task": TASK,
        "subset": pieces.subset,
        "id": str(index),
        "index": index,
        "config": config,
        "prompt_tokens": prefix.shape[1],
        "scored_tokens": continuation.shape[1] - 1,
        "score": {"loss": got.loss, "kl": kl, "equal_argmax": equal},
        "full_loss": full.loss,
        "stored": {"mean": got.stored_tokens_mean, "share": got.stored_tokens_mean / prefix.shape[1]},
        "bytes": got.bytes,
        "seconds": {"prefill": got.prefill_seconds, "decode": got.decode_seconds},
    }


def summarise(run: Run, records: Sequence[dict[str, Any]], effort: Effort) -> dict[str, Any]:
    """Plain values of summary.json: exp of the mean loss, its ratio to full, mean divergence and agreement."""
    count = len(records)
    loss, full = (
        sum(values) / count for values in ([r["score"]["loss"] for r in records], [r["full_loss"] for r in records])
    )
    stored = sum(r["stored"]["mean"] for r in records) / count
    found = {
        "n": count,
        "score": round(math.exp(loss), 4),
        "perplexity_ratio": round(math.exp(loss - full), 5),
        "kl": round(sum(r["score"]["kl"] for r in records) / count, 6),
        "equal_argmax": round(sum(r["score"]["equal_argmax"] for r in records) / count, 5),
        "stored": {"prefill": stored, "end": stored, "share": sum(r["stored"]["share"] for r in records) / count},
    }
    if all(r.get("bytes") for r in records):
        held = {name: sum(r["bytes"][name] for r in records) for name in ("kv", "allocated", "full")}
        found["bytes"] = {
            "kv": held["kv"] / count,
            "allocated": held["allocated"] / count,
            "share": round(held["kv"] / held["full"], 5),
        }
    return {
        "task": TASK,
        **run.settings(),
        "score": found["score"],
        "subsets": {records[0]["subset"]: found},
        "total": found,
        "call": effort.to_dict(),
    }
