# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, declared once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_command(commands: Any, name: str, text: str, run: Callable[..., int] | None = None) -> argparse.ArgumentParser:
    """A command of what argparse's add_subparsers returned.

    Args:
        text: one sentence on it. run: called with the arguments and a progress line; None where commands follow.
    """
    parser = commands.add_parser(name, help=text.lower().rstrip("."), description=text)
    if run is not None:
        parser.set_defaults(command=run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model."""
    parser.add_argument("--model", required=True, help="folder, .gguf file, hub name, or smollm2-135m")


def add_texts(parser: argparse.ArgumentParser) -> None:
    """--text, with WikiText-2 as default."""
    parser.add_argument(
        "--text",
        nargs="+",
        default=["wikitext2"],
        metavar="FILE",
        help="UTF-8 files, or wikitext2 (default): its train split, of a file at hand or through the package datasets",
    )


def add_machine(parser: argparse.ArgumentParser, dtypes: str = "auto (default), float32, float16, bfloat16") -> None:
    """--device and --dtype; dtypes: what the second one takes, for the help."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    parser.add_argument("--dtype", default="auto", help=dtypes)


def add_json(parser: argparse.ArgumentParser, text: str = "one JSON object on stdout instead of lines") -> None:
    """--json; text: its help."""
    parser.add_argument("--json", action="store_true", help=text)


def add_progress(parser: argparse.ArgumentParser) -> None:
    """--progress."""
    parser.add_argument("--progress", action="store_true", help="show progress though stderr is no terminal")
