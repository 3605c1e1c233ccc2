# SPDX-License-Identifier: Apache-2.0
"""Times the CPU bodies that a user waits on beside plain torch: python benchmarks/cpu.py --json rows.json."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [] if str(BENCHMARKS) in sys.path else [str(BENCHMARKS)]
sys.path.append(str(BENCHMARKS.parent))

from harness import percentile  # noqa: E402
from kernels.bench_decode_evict import BITS, POOL, VOTE_WINDOW, WINDOW, eager_step  # noqa: E402
from run import commit  # noqa: E402

from uncomp import ops  # noqa: E402

HEADS, ROWS, DIM = 32, 8, 128
GROUP = HEADS // ROWS
SCALE = DIM**-0.5
OURS = "ours"
ROUNDS = (3, 200)  # fewest and most
Call = Callable[[], object]


@dataclass
class Entry:
    """One case; `make()` builds its inputs and returns the calls to be timed by name, ours first."""

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], dict[str, Call]]


def int32(values) -> torch.Tensor:
    return torch.as_tensor(values).to(torch.int32)


def arena(lengths: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Rows without free slots: keys, values, row_start, row_len."""
    keys, values = (torch.randn(sum(lengths), DIM).to(dtype) for _ in range(2))
    return keys, values, int32(torch.tensor([0, *lengths]).cumsum(0)), int32(lengths)


def dense_attention(query, keys, values, batch: int) -> dict[str, Call]:
    """Torch's attention over equal rows: grouped heads, and the g heads of a row as g queries of one head."""
    keys, values = (x.view(batch, ROWS, -1, DIM) for x in (keys, values))
    packed = query.view(batch, ROWS, GROUP, DIM)
    attention = torch.nn.functional.scaled_dot_product_attention
    return {
        "sdpa, packed": lambda: attention(packed, keys, values),
        "sdpa, enable_gqa": lambda: attention(query, keys, values, enable_gqa=True),
    }


def decode_attention(name: str, lengths: Sequence[int], batch: int, dtype: torch.dtype) -> Entry:
    def make():
        query = torch.randn(batch, HEADS, 1, DIM).to(dtype)
        rows = arena(lengths, dtype)
        calls = {OURS: lambda: ops.decode_attention(query, *rows, SCALE)}
        if len(set(lengths)) == 1:
            return calls | dense_attention(query, *rows[:2], batch)
        even = (*rows[:2], int32(torch.arange(len(lengths) + 1) * (sum(lengths) // len(lengths))))
        same = int32([sum(lengths) // len(lengths)] * len(lengths))
        return calls | {"ours, equal rows": lambda: ops.decode_attention(query, *even, same, SCALE)}

    return Entry("decode_attention", name, dtype, make)


def decode_evict(name: str, lengths: Sequence[int], batch: int, dtype: torch.dtype) -> Entry:
    def make():
        token = [torch.randn(batch, heads, 1, DIM).to(dtype) for heads in (HEADS, ROWS, ROWS)]
        keys, values, start, length = arena(lengths, dtype)
        order = int32(torch.cat([torch.arange(n) for n in lengths]))
        votes = torch.randint(0, 2**BITS // 1000, (VOTE_WINDOW, sum(lengths))).int()
        state = [keys, values, order.clone(), votes, votes.sum(0, dtype=torch.int32), int32([0] * len(lengths)), order]
        step = [*token, int32([10**6] * batch), start, length, *state]
        calls = {
            OURS: lambda: ops.decode_evict_(*step, window=WINDOW, sink=0, pool=POOL, scale=SCALE),
            "ours, decode_attention alone": lambda: ops.decode_attention(token[0], keys, values, start, length, SCALE),
        }
        if len(set(lengths)) == 1:
            other = [x.clone() for x in step]
            calls["torch eager"] = lambda: eager_step(other, lengths[0])
            calls |= {
                f"{name}, attention alone": f for name, f in dense_attention(token[0], keys, values, batch).items()
            }
        return calls

    return Entry("decode_evict_", name, dtype, make)


def window_scores(tokens: int, window: int, dtype: torch.dtype) -> Entry:
    def make():
        # As transformers lays them out: heads behind tokens in memory.
        query = torch.randn(1, window, HEADS, DIM).to(dtype).transpose(1, 2)
        key = torch.randn(1, tokens, ROWS, DIM).to(dtype).transpose(1, 2)
        behind = torch.arange(tokens)[None] > torch.arange(tokens - window, tokens)[:, None]

        def eager(query, key):
            logits = query.reshape(1, ROWS, GROUP * window, DIM) @ key.mT * SCALE
            logits = logits.view(1, HEADS, window, tokens).masked_fill(behind, float("-inf"))
            return torch.softmax(logits, -1, dtype=torch.float32).sum(2).view(ROWS, GROUP, tokens).mean(1)

        calls = {OURS: lambda: ops.window_scores(query, key, SCALE), "torch eager": lambda: eager(query, key)}
        if dtype != torch.float32:
            calls["torch eager, float32"] = lambda: eager(query.float(), key.float())
        return calls

    return Entry("window_scores", f"8x{tokens} W={window}", dtype, make)


def seed_votes(name: str, lengths: Sequence[int], window: int, dtype: torch.dtype) -> Entry:
    def make():
        query = torch.randn(1, HEADS, window, DIM).to(dtype)
        keys, _, start, length = arena(lengths, dtype)
        lse, slots = torch.full((1, HEADS, window), 12.0), sum(lengths)
        at = int32(torch.arange(32768 - window, 32768))[None]
        position = int32(torch.cat([torch.arange(n) for n in lengths]))
        state = [torch.empty(s, dtype=torch.int32) for s in [(window, slots), (slots,), (len(lengths),), (slots,)]]
        args = (query, lse, at, keys, position, start, length, *state, SCALE)
        dense = keys.view(1, ROWS, lengths[0], DIM)

        def eager():
            logits = (query.view(1, ROWS, GROUP * window, DIM) @ dense.mT).float() * SCALE
            weight = (logits.view(1, HEADS, window, -1) - lse[..., None]).exp()
            votes = (weight.view(1, ROWS, GROUP, window, -1).mean(2) * 2**BITS).round().to(torch.int32)
            return votes, votes.sum(2)

        return {OURS: lambda: ops.seed_votes_(*args), "torch eager": eager}

    return Entry("seed_votes_", name, dtype, make)


def entries() -> list[Entry]:
    """All cases. Building the list allocates nothing."""
    budgets = [2070, 1034] * 4  # two to one, mean 1552
    both, all_dtypes = (torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float16)
    found = []
    for dtype in all_dtypes:
        for batch in (1, 4) if dtype != torch.float16 else (1,):
            for n in (1552, 4096, 32768):
                found.append(decode_attention(f"B {batch}, 8x{n}", [n] * 8 * batch, batch, dtype))
        found.append(decode_attention("B 1, 8x1552 mean, budgets 2:1", budgets, 1, dtype))
    for dtype in both:
        found.append(decode_attention("B 1, one row of 12416", [12409, *[1] * 7], 1, dtype))
        found += [decode_evict(f"B {batch}, 8x1552", [1552] * 8 * batch, batch, dtype) for batch in (1, 4)]
        found.append(decode_evict("B 1, 8x1552 mean, budgets 2:1", budgets, 1, dtype))
        found.append(decode_evict("B 1, 8x32768", [32768] * 8, 1, dtype))
        found += [window_scores(n, w, dtype) for n in (4096, 32768) for w in (1, 8, 32)]
        found.append(seed_votes("8x1552", [1552] * 8, 8, dtype))
    return found


def interleave(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Microseconds of every call, taken in turns, so that whatever else the machine does meets all of them alike."""
    names = list(calls)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(ROUNDS[1]):
        if turn >= ROUNDS[0] and time.perf_counter() > end:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - begin) * 1e6)
    return times


def statistics(times: Sequence[float]) -> dict[str, float]:
    return {
        "median_us": percentile(times, 0.5),
        "min_us": min(times),
        "spread_us": percentile(times, 0.9) - percentile(times, 0.1),
        "rounds": len(times),
    }


def cpu_name() -> str:
    """Model name of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def make_row(entry: Entry, threads: int, times: dict[str, list[float]]) -> dict[str, object]:
    """One row of the JSON."""
    return {
        "op": entry.op,
        "shape": entry.shape,
        "dtype": str(entry.dtype)[6:],
        "device": cpu_name(),
        "threads": threads,
        "commit": commit(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **statistics(times[OURS]),
        "rivals": [{"name": name, **statistics(t)} for name, t in times.items() if name != OURS],
    }


def table(rows: Sequence[dict]) -> str:
    """One line a case and rival: how many times slower the rival is, by medians and by minima."""
    lines = [["op", "shape", "dtype", "threads", "us", "rival", "us", "ratio", "of minima"]]
    for row in rows:
        for rival in row["rivals"]:
            ratios = [f"{rival[key] / row[key]:.2f}x" for key in ("median_us", "min_us")]
            cells = [row["op"], row["shape"], row["dtype"], str(row["threads"]), f"{row['median_us']:.0f}"]
            lines.append([*cells, rival["name"], f"{rival['median_us']:.0f}", *ratios])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = list(dict.fromkeys(entry.op for entry in entries()))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="*", metavar="OP", default=known, choices=known, help="default: all")
    parser.add_argument("--threads", nargs="*", type=int, metavar="N", default=[1, torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=1.5, help="of one case and number of threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    options = parser.parse_args(arguments)
    if any(n < 1 for n in options.threads):
        parser.error(f"--threads: wanted 1 or more, got {min(options.threads)}")
    if options.json is not None:
        try:
            options.json.open("a").close()  # known before anything is timed
        except OSError as error:
            parser.error(f"--json: cannot write {options.json}: {error.strerror}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    options = parse(arguments)
    rows = []
    with torch.inference_mode():
        for entry in entries():
            if entry.op not in options.ops:
                continue
            torch.manual_seed(0)
            calls = entry.make()
            for threads in dict.fromkeys(options.threads):
                torch.set_num_threads(threads)
                rows.append(make_row(entry, threads, interleave(calls, options.seconds)))
            print(f"{entry.op} {entry.shape} {entry.dtype}", file=sys.stderr)
    rows.sort(key=lambda row: row["threads"])
    print(f"{cpu_name()}, torch {torch.__version__}, commit {commit()}")
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
