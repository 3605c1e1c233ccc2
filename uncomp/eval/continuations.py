# SPDX-License-Identifier: Apache-2.0
"""Runs of the perplexity task: continuations after compressed prefixes, each beside the full cache."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uncomp.eval.folder import SUMMARY, RunFolder, write_json
from uncomp.eval.perplexity import ContinuationScore, score, windows
from uncomp.eval.processes import Processes
from uncomp.eval.prompts import adds_bos, encode
from uncomp.eval.runs import Run, with_room

TASK = "perplexity"


@dataclass(frozen=True)
class Pieces:
    """What is scored.

    Fields:
        subset: name of the text. pairs: prefix [1, A] and continuation [1, C] of every window, int64.
        mode: how continuations are fed, see `perplexity.score`.
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
) -> list[dict[str, Any]]:
    """Scores every window under every run, the full cache once a window.

    Args:
        model: not patched. about: further values of run.json.
    Returns:
        the summaries, in the order of the runs.
    Raises:
        ValueError, RunFailure: as `runner.run_all`.
    """
    done = [
        processes.from_first(lambda f=f, r=r: f.open({**about, "policy": r.policy, "budget": r.budget}, resume=resume))
        for f, r in zip(folders, runs, strict=True)
    ]
    started, failure = time.perf_counter(), None
    try:
        for index in range(processes.rank, len(pieces.pairs), processes.count):
            open_runs = [i for i in range(len(runs)) if f"{pieces.subset}/{index}" not in done[i]]
            if not open_runs:
                continue
            progress(f"window {index + 1}/{len(pieces.pairs)}, full cache")
            full, seconds = _timed(model, pieces, index, None)
            for i in open_runs:
                progress(f"window {index + 1}/{len(pieces.pairs)}, {runs[i].name}")
                got = full, seconds
                if runs[i].config.policy != "full":
                    got = _timed(model, pieces, index, runs[i])
                folders[i].append(processes.rank, [_record(pieces, index, *got, full, folders[i].hash)])
    except Exception as error:
        if processes.count == 1:
            raise
        failure = f"{type(error).__name__}: {error}"
    processes.settle(failure)
    wall = time.perf_counter() - started
    keys = [f"{pieces.subset}/{index}" for index in range(len(pieces.pairs))]

    def close(run: Run, folder: RunFolder) -> dict[str, Any]:
        values = summarise(run, folder.merge(keys), wall)
        write_json(folder.path / SUMMARY, values)
        return values

    return [processes.from_first(lambda r=r, f=f: close(r, f)) for r, f in zip(runs, folders, strict=True)]


def _timed(model: torch.nn.Module, pieces: Pieces, index: int, run: Run | None) -> tuple[ContinuationScore, float]:
    prefix, continuation = pieces.pairs[index]
    config = None if run is None else with_room(run.config, continuation.shape[1])
    started = time.perf_counter()
    return score(model, prefix, continuation, config, mode=pieces.mode), time.perf_counter() - started


def _record(
    pieces: Pieces, index: int, got: ContinuationScore, seconds: float, full: ContinuationScore, config: str
) -> dict[str, Any]:
    prefix, continuation = pieces.pairs[index]
    return {
        "task": TASK,
        "subset": pieces.subset,
        "id": str(index),
        "index": index,
        "config": config,
        "prompt_tokens": prefix.shape[1],
        "scored_tokens": continuation.shape[1] - 1,
        "score": {"loss": got.loss, "kl": got.divergence(full), "equal_argmax": got.agreement(full)},
        "full_loss": full.loss,
        "stored": {"mean": got.stored_tokens_mean, "share": got.stored_tokens_mean / prefix.shape[1]},
        "seconds": seconds,
    }


def summarise(run: Run, records: Sequence[dict[str, Any]], wall: float) -> dict[str, Any]:
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
    return {
        "task": TASK,
        **run.settings(),
        "score": found["score"],
        "subsets": {records[0]["subset"]: found},
        "total": found,
        "wall_seconds": wall,
    }
