# SPDX-License-Identifier: Apache-2.0
"""What measuring the heads costs: pieces of random tokens through the plain decoder, and through uncomp.calibrate.

A call costs something once (hooks, tables of the profile) and something a piece; a short and a long call tell them
apart. `ratio` is that of a run of 500 pieces, both parts counted, to 500 plain forwards.

The third and fourth row of a model are the entropies alone, of one layer's queries times the layers: on the device, and
as float64 singular values of NumPy on the CPU, a few heads measured and scaled to all.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_memory import allocated
from engines import clean, peak_bytes, qwen_2_5_half_b, synchronize
from torch import Tensor

import uncomp
from uncomp.calibration.watch import spectrum_of
from uncomp.models import family_of

SEQLEN = 4096
SHORT, LONG, ROUNDS = 2, 10, 3  # pieces of the two calls; how often both run
PIECES = 500  # of the run that `ratio` is about
HEADS = 4  # that NumPy measures


def rows(model: torch.nn.Module, seqlen: int = SEQLEN, half_b: torch.nn.Module | None = None) -> Iterator[dict]:
    """Four rows a model: plain forwards, uncomp.calibrate, and its entropies alone beside NumPy's.

    Args:
        model: the one of all kinds of this folder.
        seqlen: tokens of a piece.
        half_b: a second one; default: the shape of Qwen2.5-0.5B, made on the same device.
    """
    yield from _rows(model, seqlen, None)
    small = qwen_2_5_half_b(device=model.device) if half_b is None else half_b
    yield from _rows(small, seqlen, "Qwen2.5-0.5B shape, random weights, bfloat16")


def _rows(model: torch.nn.Module, seqlen: int, name: str | None) -> Iterator[dict]:
    device, text = model.device, model.config.get_text_config(decoder=True)
    tokens = torch.randint(3, text.vocab_size, (8 * seqlen,), generator=torch.Generator().manual_seed(0))
    stack, on_device = family_of(model.config).text_stack(model), tokens.to(device)

    def plain(pieces: int) -> None:
        with torch.inference_mode():
            for piece in range(pieces):
                begin = piece % 8 * seqlen
                stack(input_ids=on_device[begin : begin + seqlen][None], use_cache=False)

    def ours(pieces: int) -> None:
        uncomp.calibrate(model, None, tokens, samples=pieces, seqlen=seqlen)

    shared = {"what": "calibrate", "batch": 1, "context": seqlen, **({} if name is None else {"model": name})}
    case = {} if name is None else {"case": name.split(" ")[0]}
    found = _timed({"plain forwards": plain, "uncomp.calibrate": ours}, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())  # other models of the process do not count
    for each in found.values():
        work = each.pop("work_bytes")
        each["weights_bytes"], each["peak_bytes"] = weights, None if work is None else weights + work
    for engine, each in found.items():
        beside = {} if engine == "plain forwards" else _beside(each, found["plain forwards"])
        yield {**shared, **case, "engine": engine, **each, **beside}
    yield from _entropies(model, seqlen, {**shared, **case}, found["uncomp.calibrate"]["ms_per_piece"])


def _beside(each: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """A row beside the plain forwards: time of a long run, peak with the weights and without."""
    total = each["ms_once"] + PIECES * each["ms_per_piece"]
    fields = {"ratio": total / (PIECES * plain["ms_per_piece"]), "ratio_pieces": PIECES}
    if each["peak_bytes"] is not None:
        work, base = (row["peak_bytes"] - row["weights_bytes"] for row in (each, plain))
        fields |= {"peak_ratio": each["peak_bytes"] / plain["peak_bytes"], "work_ratio": work / base}
    return fields


def _timed(calls: dict[str, Callable[[int], None]], device: torch.device) -> dict[str, dict[str, Any]]:
    """Milliseconds once and a piece, medians of rounds in which the calls take turns; bytes besides weights."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    work: dict[str, int | None] = {}
    for call in calls.values():
        call(SHORT)  # not counted: kernels are chosen, workspaces made
    for _ in range(ROUNDS):
        for name, call in calls.items():
            clean(device)
            before = allocated(device)
            short, long = _seconds(call, SHORT, device), _seconds(call, LONG, device)
            peak = peak_bytes(device)
            work[name] = None if peak is None or before is None else peak - before
            times[name].append((short, long))
    found = {}
    for name, pairs in times.items():
        each = [1e3 * (long - short) / (LONG - SHORT) for short, long in pairs]
        piece = statistics.median(each)
        once = max(0.0, 1e3 * statistics.median(long for _, long in pairs) - LONG * piece)
        found[name] = {
            "ms_per_piece": piece,
            "spread_ms": max(each) - min(each),
            "ms_once": once,
            "work_bytes": work[name],
        }
    return found


def _seconds(call: Callable[[int], None], pieces: int, device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    call(pieces)
    synchronize(device)
    return time.perf_counter() - begin


def _entropies(model: torch.nn.Module, seqlen: int, shared: dict, piece_ms: float) -> Iterator[dict]:
    """The entropies of a piece alone: ours on the device, then NumPy's on the CPU."""
    text = model.config.get_text_config(decoder=True)
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    queries = torch.randn(1, heads, seqlen, dim, generator=torch.Generator().manual_seed(1)).to(model.device)
    queries = queries.to(model.dtype)

    def on_device(times: int) -> None:
        for _ in range(times):
            uncomp.ops.matrix_entropy(spectrum_of(queries), max(1, dim // 4), dim)

    on_device(3)
    ours = 1e3 * statistics.median(_seconds(on_device, layers, model.device) for _ in range(ROUNDS))
    measured = min(HEADS, heads)
    states = queries[0, :measured].cpu().double()
    singular_values(states[:1])  # not counted: libraries start their threads
    begin = time.perf_counter()
    singular_values(states)
    svd = 1e3 * (time.perf_counter() - begin) / measured * heads * layers
    yield {**shared, "engine": "entropies alone", "ms_per_piece": ours}
    note = f"float64 NumPy SVD on the CPU, {measured} of {layers * heads} heads measured and scaled"
    yield {
        **shared,
        "engine": f"entropies alone, {note}",
        "ms_per_piece": svd,
        "cpus": os.cpu_count(),
        "slower": svd / ours,  # than our entropies alone
        "slower_than_calibrate": svd / piece_ms,  # than a piece of calibrate, its forward included
    }


def singular_values(states: Tensor) -> list[float]:
    """Entropies of k = D / 4 eigenvalues of heads [H, S, D] float64, by singular values of the tokens."""
    import numpy as np

    found = []
    for head in states.numpy():
        centred = head - head.mean(0)
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        shares = np.linalg.svd(unit, compute_uv=False) ** 2
        shares = shares / shares.sum()
        kept = shares[: max(1, head.shape[1] // 4)]
        found.append(float(-(kept * np.log(kept)).sum() / np.log(head.shape[1])))
    return found
