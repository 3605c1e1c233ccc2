# SPDX-License-Identifier: Apache-2.0
"""Scores policies at several budgets on LongBench and prints the table; a tiny random model and made-up records.

With `--model DIR --data LONGBENCH` they are real: a folder with `TASK.jsonl` or `base/TASK.jsonl`, and `config/` with
the benchmark's templates and lengths. The command line does the same: `uncomp eval longbench`, then `uncomp report`.
Several processes: `accelerate launch --num_processes P` in front of it, with --model, --data and --out.
"""

import argparse
import os
import tempfile
from pathlib import Path

from uncomp import cli
from uncomp.eval import sample
from uncomp.testing import tiny_folder


def main():
    """Runs, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: a tiny Llama with random weights")
    parser.add_argument("--data", help="LongBench; default: a few records made up here")
    parser.add_argument("--out", help="where runs and report go; default: a folder that is removed")
    parser.add_argument("--policy", nargs="+", default=["full", "snapkv", "uncomp"])
    parser.add_argument("--budget", nargs="+", default=["64", "0.5"], help="tokens, or shares of the prompt")
    parser.add_argument("--question", nargs="+", default=["aware"], help="aware, agnostic or both")
    args, others = parser.parse_known_args()  # --limit, --subset, --batch-size, ...: see uncomp eval longbench --help

    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or scratch
        given = ["--model", args.model or str(tiny_folder(Path(scratch) / "model"))]
        data = [args.data] if args.data else [str(sample.write(Path(scratch) / "data")), "--subset", sample.TASK]
        given += ["--out", out, "--data", *data]
        for name in ("policy", "budget", "question"):
            for value in getattr(args, name):
                given += [f"--{name}", value]
        status = cli.main(["eval", "longbench", *given, *others])
        if status == 0 and os.environ.get("RANK", "0") == "0":
            status = cli.main(["report", str(Path(out) / "longbench"), "--out", str(Path(out) / "report")])
    return status


if __name__ == "__main__":
    raise SystemExit(main())
