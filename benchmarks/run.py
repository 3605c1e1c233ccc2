# SPDX-License-Identifier: Apache-2.0
"""Times operators, and what is made of them, beside rivals: python benchmarks/run.py --ops select_tokens --json F.

Whole models, of the shape of Llama-3-8B with random weights: python benchmarks/run.py --model decode memory --json F.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parent
# Bench files say `from harness import Case`; an installed uncomp comes before the one of this source tree.
sys.path[:0] = [] if str(BENCHMARKS) in sys.path else [str(BENCHMARKS)]
sys.path.append(str(BENCHMARKS.parent))

import model_rows  # noqa: E402
from harness import Case, Plan, Timing, copy_bandwidth, first_line, read_bandwidth, time_entry  # noqa: E402

import uncomp  # noqa: E402
from uncomp import _extension  # noqa: E402


def registry() -> dict[str, Path]:
    """Bench file of every operator that has one: kernels/bench_<op>.py, the underscore of in-place names left out.

    Compositions of operators stand behind them: layer/bench_<name>.py.
    """
    paths = {op: BENCHMARKS / "kernels" / f"bench_{op.rstrip('_')}.py" for op in _extension.op_names()}
    known = {op: path for op, path in paths.items() if path.exists()}
    return known | {path.stem[len("bench_") :]: path for path in sorted((BENCHMARKS / "layer").glob("bench_*.py"))}


def load_cases(path: Path) -> list[Case]:
    """The cases of a bench file. Building them allocates nothing."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cases()


def without_compile(cases: list[Case], keep: str) -> list[Case]:
    """Cases with torch.compile among the rivals of all of them ("all"), of the first that has it ("first"), of none."""
    for case in cases:
        names = [name for name in case.rivals if name.startswith("torch.compile")]
        if keep == "none" or (keep == "done" and names):
            case.rivals = {name: make for name, make in case.rivals.items() if name not in names}
        elif keep == "first" and names:
            keep = "done"
    return cases


def commit() -> str:
    """Commit of the numbers: UNCOMP_COMMIT, else git's, else "unknown"."""
    if named := os.environ.get("UNCOMP_COMMIT"):
        return named
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=BENCHMARKS, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def clocks() -> dict[str, str]:
    """Clocks as nvidia-smi reads them now; empty where it is missing."""
    names = ["clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw"]
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = text.strip().splitlines()
    return dict(zip(names, (x.strip() for x in lines[0].split(",")), strict=False)) if lines else {}


def machine(plan: Plan) -> dict[str, object]:
    """What every row of this process shares."""
    return {
        "device": torch.cuda.get_device_name(),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_bandwidth_tb_s": copy_bandwidth(plan),
        "read_bandwidth_tb_s": read_bandwidth(plan),
    }


def timing_fields(timing: Timing) -> dict[str, object]:
    """A timing as it stands in a row."""
    fields: dict[str, object] = {
        "median_us": timing.median_us,
        "p10_us": timing.p10_us,
        "p90_us": timing.p90_us,
        "spread_us": timing.spread_us,
        "eager": timing.eager,
        "sets": timing.sets,
    }
    return fields if timing.error is None else {**fields, "error": timing.error}


def make_row(case: Case, ours: Timing, rivals: dict[str, Timing], shared: dict[str, object]) -> dict[str, object]:
    """One row of the JSON."""
    copy = float(shared["copy_bandwidth_tb_s"])  # type: ignore[arg-type]
    share = None if not ours.median_us else case.bytes / ours.median_us / 1e6 / copy
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "bytes": case.bytes,
        **timing_fields(ours),
        "copy_share": share,
        "rivals": [{"name": name, **timing_fields(timing)} for name, timing in rivals.items()],
        **shared,
    }


def time_case(case: Case, plan: Plan) -> tuple[Timing, dict[str, Timing]]:
    """Our call, then each rival. What a kernel noted in the device's error word makes the row an error."""
    ours = time_entry(case.ours, case.bytes, plan)
    try:
        uncomp.raise_device_errors()
    except Exception as error:
        ours = Timing(error=first_line(error))
    return ours, {name: time_entry(make, case.bytes, plan) for name, make in case.rivals.items()}


def best_rival(row: dict) -> dict | None:
    """The fastest rival that ran."""
    ran = [r for r in row["rivals"] if r["median_us"] is not None]
    return min(ran, key=lambda r: r["median_us"]) if ran else None


def table(rows: Sequence[dict]) -> str:
    """One line a case: microseconds, spread, share of the copy bandwidth, fastest rival and how much slower it is."""
    heads = ["op", "shape", "dtype", "us", "spread", "copy", "best rival", "us", "ratio"]
    lines = [heads]
    notes = []
    for row in rows:
        cells = [row["op"], row["shape"], row["dtype"]]
        if row["median_us"] is None:
            cells += ["error", "", ""]
            notes.append(f"{row['op']} {row['shape']} {row['dtype']}: {row['error']}")
        else:
            eager = " (eager)" if row["eager"] else ""
            cells += [f"{row['median_us']:.2f}{eager}", f"{row['spread_us']:.2f}", f"{row['copy_share']:.0%}"]
        best = best_rival(row)
        if best is None:
            cells += ["", "", ""]
        else:
            ratio = f"{best['median_us'] / row['median_us']:.2f}x" if row["median_us"] else ""
            cells += [best["name"] + (" (eager)" if best["eager"] else ""), f"{best['median_us']:.2f}", ratio]
        lines.append(cells)
        notes += [f"{row['op']} {row['shape']}, rival {r['name']}: {r['error']}" for r in row["rivals"] if "error" in r]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(text + notes)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments; an operator without a bench file is an error that lists those that have one."""
    known = registry()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="*", metavar="OP", default=[], help="operators to time; default: all")
    parser.add_argument("--model", nargs="*", metavar="WHAT", help=f"whole models: {', '.join(model_rows.KINDS)}")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument(
        "--compile",
        choices=["all", "first", "none"],
        default="all",
        help="cases of an operator in which torch.compile is a rival; each costs seconds of compilation",
    )
    parser.add_argument("--quick", action="store_true", help="fewer groups and less time a case")
    options = parser.parse_args(arguments)
    if options.model is not None:
        options.model = options.model or list(model_rows.KINDS)
        for what in options.model:
            if what not in model_rows.KINDS:
                parser.error(f"--model: {what!r} is none of {', '.join(model_rows.KINDS)}")
    options.ops = options.ops or list(known)
    for op in options.ops:
        if op not in known:
            parser.error(f"--ops: no bench file for {op!r}; there is one for {', '.join(known)}")
    return options


def whole_models(options: argparse.Namespace) -> int:
    """Runs the benchmarks of a whole model; 1 if one of them failed."""
    import transformers
    from engines import llama_3_8b

    shared = {
        "model": f"Llama-3-8B shape, {options.layers} layers, random weights, bfloat16",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }
    rows = []
    for row in model_rows.rows(options.model, llama_3_8b(options.layers), shared):
        rows.append(row)
        print(model_rows.table([row]).splitlines()[-1], file=sys.stderr, flush=True)
        if options.json is not None:  # a long run: what is measured is kept
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{shared['device']}, {shared['model']}, torch {shared['torch']}, commit {shared['commit']}")
    print(model_rows.table(rows))
    return 1 if any("error" in row for row in rows) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 2 without a GPU, 1 when one of our own calls failed."""
    options = parse(arguments)
    if not torch.cuda.is_available() or not _extension.build_info()["cuda"]:
        print("benchmarks need a CUDA device and a build of uncomp with CUDA kernels", file=sys.stderr)
        return 2
    uncomp.warmup()
    if options.model is not None:
        return whole_models(options)
    plan = Plan(groups=6, seconds=0.1) if options.quick else Plan()
    shared = machine(plan)
    rows = []
    with torch.no_grad():
        for op in options.ops:
            cases = without_compile(load_cases(registry()[op]), options.compile)
            timed = [(case, *time_case(case, plan)) for case in cases]
            now = {**shared, "clocks": clocks()}
            rows += [make_row(case, ours, rivals, now) for case, ours, rivals in timed]
            print(f"{op}: {len(timed)} cases", file=sys.stderr)
            if options.json is not None:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    copy, read = shared["copy_bandwidth_tb_s"], shared["read_bandwidth_tb_s"]
    print(f"{shared['device']}, torch {shared['torch']}, commit {shared['commit']}")
    print(f"copy {copy:.2f} TB/s, read {read:.2f} TB/s")
    print(table(rows))
    return 1 if any(row["median_us"] is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
