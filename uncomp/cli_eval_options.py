# SPDX-License-Identifier: Apache-2.0
"""Options of `uncomp eval`, and the values that they take."""

from __future__ import annotations

import argparse

from uncomp.cli_options import add_json, add_machine, add_model, add_progress
from uncomp.config import known_policies


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every task."""
    add_model(parser)
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME[:FIELD=VALUE,...]",
        help=f"repeatable; standard (those that every table names), {', '.join(known_policies())}; default uncomp",
    )
    parser.add_argument("--budget", action="append", type=budget, metavar="N|SHARE", help="repeatable; default 384")
    parser.add_argument("--data", required=True, metavar="PATH", help="the benchmark's own files")
    parser.add_argument("--out", required=True, metavar="DIR", help="every run goes to DIR/TASK/POLICY-BUDGET-MODE")
    parser.add_argument("--limit", type=count, metavar="N", help="the first N records of each subset")
    parser.add_argument("--resume", action="store_true", help="go on with runs that are there")
    parser.add_argument("--window", type=count, metavar="W", help="one observation window for all policies")
    parser.add_argument("--pool-width", type=count, metavar="P", help="one pooling width for all policies")
    parser.add_argument("--profile", help="a calibrated profile for policies that order heads")
    parser.add_argument("--decode", choices=("evict", "grow"), help="for all policies; default evict")
    parser.add_argument("--skip-sliding", action="store_true", help="accept sliding-window layers, uncompressed")
    parser.add_argument("--seed", type=int, default=42, help="default %(default)s")
    add_machine(parser)
    add_json(parser, "summaries on stdout, one JSON object a line")
    add_progress(parser)


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Options of tasks that generate."""
    parser.add_argument("--subset", type=names, metavar="A,B", help="files or settings of the task by name")
    parser.add_argument("--batch-size", type=count, default=1, metavar="B", help="default %(default)s")
    parser.add_argument(
        "--question",
        action="append",
        choices=("aware", "agnostic"),
        help="compress with the question in sight (default) or before it comes; repeatable",
    )
    parser.add_argument("--max-prompt", type=count, metavar="M", help="longer prompts are cut in the middle")
    parser.add_argument("--max-new-tokens", type=count, metavar="N", help="instead of the benchmark's own")
    parser.add_argument("--chat", choices=("auto", "on", "off"), default="auto", help="default %(default)s")
    parser.add_argument(
        "--rounds", type=count, default=1, metavar="N", help="every run does a share before any does the next"
    )
    parser.add_argument("--compare", metavar="DIR", help="a finished run of full to tell the agreement with")
    parser.add_argument("--teacher-forced", action="store_true", help="also compare next tokens along full's text")
    parser.add_argument("--per-row", action="store_true", help="records tell the stored tokens of every row")
    parser.add_argument("--skip-bad", action="store_true", help="leave out lines that cannot be used, and say so")


# ---- values
def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def none_or_more(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0; got {text!r}")
    return int(text)


def numbers(text: str) -> list[int]:
    """Whole numbers between commas."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be whole numbers like 0,50,100; got {text!r}")
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Names between commas."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"must be names like a,b; got {text!r}")
    return found


def budget(text: str) -> int | float:
    """Tokens or a share."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"must be whole tokens or a share like 0.0938; got {text!r}")
