# SPDX-License-Identifier: Apache-2.0
"""Rows of run.py as Markdown tables, operators with targets: python benchmarks/report.py results/h200-model.json."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [] if str(BENCHMARKS) in sys.path else [str(BENCHMARKS)]

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of a JSON file of rows, or the tables of rows of whole models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, metavar="FILE", help="JSON that run.py wrote")
    rows = json.loads(parser.parse_args(arguments).rows.read_text())
    print(model_rows.table(rows) if rows and "what" in rows[0] else markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
