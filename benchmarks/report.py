# SPDX-License-Identifier: Apache-2.0
"""Rows of run.py and cpu.py as tables, operators with targets: python benchmarks/report.py results/h200-model.json."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [] if str(BENCHMARKS) in sys.path else [str(BENCHMARKS)]

import cpu  # noqa: E402
import model_rows  # noqa: E402

# Microseconds on one H200, a call and layer.
TARGETS = {
    ("matrix_spectrum", "32x129 D 128 top 32"): 45,
    ("matrix_spectrum", "256x129 D 128 top 128"): 120,
    ("matrix_spectrum", "32x4096 D 128 top 32"): 60,
    ("matrix_spectrum", "32x32768 D 128 top 32"): 220,
    ("allocate_budget", "1x32 rows, 2 groups, with group_heads"): 4,
    ("window_scores", "8x32768 W=8"): 40,
    ("window_scores", "8x32768 W=32"): 40,
    ("window_scores", "8x131072 W=8"): 160,
    ("select_tokens", "8x32768 k=1552"): 10,
    ("select_tokens", "8x131072 k=1552"): 15,
    ("select_tokens", "256x32768 k=1552"): 60,
    ("compact_kv", "8x1552 of 32768"): 5,
    ("compact_kv", "8x13107 of 131072"): 29,
    ("append_kv_", "8 rows, T 1"): 2.5,
    ("append_kv_", "8 rows, T 512"): 4,
    ("decode_attention", "8x32768"): 36,
    ("decode_attention", "8x131072"): 132,
    ("decode_attention", "8x1552 mean, budgets 2:1"): 6,
    ("decode_attention", "B 32, 8x1552 mean"): 52,
    ("decode_attention", "B 256, 8x1552 mean"): 400,
    ("decode_evict_", "8x1552"): 8,
    ("decode_evict_", "B 32, 8x1552"): 58,
    ("decode_evict_", "B 256, 8x1552"): 415,
    ("ragged_attention", "T 512 over 8x1552"): 40,
    ("ragged_attention", "T 8192 over 8x1552"): 500,
    ("gather_tokens", "16384 of 32768, E 4096"): 78,
    ("compress_layer", "32768 tokens, 8x1552"): 300,
}
# A case whose target is a multiple of another case's time in the same run: attention over uneven rows.
RELATIVE = {
    ("decode_attention", "one row 8x the others, 8x32768 mean"): (("decode_attention", "8x32768"), 1.05),
}
# How many times faster than a rival of the same row a case has to be.
FACTORS = [
    ("matrix_spectrum", "32x129 D 128 top 32", "torch eager", 1000),
    ("matrix_spectrum", "256x129 D 128 top 128", "torch eager", 3000),
    ("matrix_spectrum", "256x129 D 128 top 128", "cuSOLVER XsyevBatched alone", 10),
    ("matrix_spectrum", "32x4096 D 128 top 32", "torch eager", 900),
    ("matrix_spectrum", "32x32768 D 128 top 32", "torch eager", 200),
    ("allocate_budget", "1x32 rows, 2 groups, with group_heads", "torch eager", 5),
    ("window_scores", "8x32768 W=8", "torch", 15),
    ("window_scores", "8x32768 W=8", "flash-colreduce", 1.5),
    ("window_scores", "8x32768 W=32", "torch", 15),
    ("window_scores", "8x131072 W=8", "torch", 15),
    ("select_tokens", "8x32768 k=1552", "max_pool, topk, sort", 12),
    ("compact_kv", "8x1552 of 32768", "gather", 4),
    ("compact_kv", "8x13107 of 131072", "gather", 1.5),
    ("append_kv_", "8 rows, T 1", "index_copy_", 3),
    ("append_kv_", "8 rows, T 512", "index_copy_", 3),
    ("decode_attention", "8x32768", "cudnn", 1.1),
    ("decode_attention", "8x32768", "flash", 1.4),
    ("decode_attention", "8x131072", "cudnn", 1.0),
    ("decode_attention", "8x131072", "flash", 1.15),
    ("decode_attention", "B 32, 8x1552 mean", "varlen", 1.2),
    ("decode_attention", "B 256, 8x1552 mean", "varlen", 1.2),
    ("decode_attention", "one row 8x the others, 8x32768 mean", "varlen", 1.5),
    ("decode_evict_", "8x1552", "torch eager", 20),
    ("decode_evict_", "B 32, 8x1552", "decode_attention alone", 1 / 1.05),
    ("decode_evict_", "B 256, 8x1552", "decode_attention alone", 1 / 1.05),
    ("ragged_attention", "T 512 over 8x1552", "sdpa, padded mask", 2),
    ("ragged_attention", "T 8192 over 8x1552", "varlen", 1.0),
    ("gather_tokens", "16384 of 32768, E 4096", "index_select", 1.2),
    ("gather_tokens", "16384 of 32768, E 4096", "gather", 2),
]


def micros(us: float) -> str:
    """One digit behind the point below 100."""
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def target_of(key: tuple[str, str], medians: dict[tuple[str, str], float]) -> float | None:
    """Microseconds that a case may take; None where nobody asked."""
    if key in RELATIVE:
        other, times = RELATIVE[key]
        return medians[other] * times if other in medians else None
    return TARGETS.get(key)


def markdown(rows: Sequence[dict]) -> str:
    """The table; a median that meets its target as it is printed is bold."""
    medians = {(row["op"], row["shape"]): row["median_us"] for row in rows if row["median_us"] is not None}
    heads = ["operator", "shape", "µs", "spread", "target", "share of copy", "fastest rival", "µs"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        key = row["op"], row["shape"]
        if row["median_us"] is None:
            lines.append([f"`{key[0]}`", key[1], "error", "", "", "", "", ""])
            continue
        target, got = target_of(key, medians), micros(row["median_us"])
        if target is not None and float(got) <= float(micros(target)):
            got = f"**{got}**"
        ran = [rival for rival in row["rivals"] if rival["median_us"] is not None]
        best = min(ran, key=lambda rival: rival["median_us"], default=None)
        lines.append(
            [
                f"`{key[0]}`",
                key[1],
                got,
                f"{row['spread_us']:.1f}",
                "" if target is None else f"{target:.3g}",
                f"{row['copy_share']:.0%}",
                best["name"] if best else "",
                micros(best["median_us"]) if best else "",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def factors(rows: Sequence[dict]) -> str:
    """How many times faster than its rivals a case is, where a factor is wanted; one that is met is bold."""
    lines = [["operator", "shape", "rival", "µs", "times faster", "wanted"], ["---"] * 6]
    by_case = {(row["op"], row["shape"]): row for row in rows if row["median_us"] is not None}
    for op, shape, name, wanted in FACTORS:
        row = by_case.get((op, shape))
        rivals = {rival["name"]: rival["median_us"] for rival in row["rivals"]} if row is not None else {}
        if rivals.get(name) is None:
            continue
        got = rivals[name] / row["median_us"]
        text = f"{got:.0f}" if got >= 100 else f"{got:.3g}"
        lines.append(
            [f"`{op}`", shape, name, micros(rivals[name]), f"**{text}**" if got >= wanted else text, f"{wanted:.4g}"]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables of a JSON file of rows: of operators, of whole models, or of CPU bodies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, metavar="FILE", help="JSON that run.py or cpu.py wrote")
    path = parser.parse_args(arguments).rows
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        parser.error(f"{path}: not a list of rows")
    if rows and "what" in rows[0]:
        print(model_rows.table(rows))
    elif rows and "threads" in rows[0]:
        print(cpu.table(rows))
    else:
        print(markdown(rows), factors(rows), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
