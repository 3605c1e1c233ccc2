# SPDX-License-Identifier: Apache-2.0
"""The command line: `uncomp info`, commands in files of their own, and how each of them ends."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import uncomp
from uncomp import cli_calibrate, cli_eval, cli_generate, cli_lorc, cli_report, cli_show, cli_study, cli_votes
from uncomp.config import known_policies

BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """One line instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


class _Progress:
    """One line on stderr that is written over."""

    def __init__(self, shown: bool) -> None:
        self.shown, self.label, self.width = shown, "", 0

    def __call__(self, text: str) -> None:
        """Shows this instead of what stands there."""
        if self.shown:
            line = f"{self.label}: {text}" if self.label else text
            print("\r" + line.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = len(line)

    def clear(self) -> None:
        """Leaves an empty line."""
        if self.shown and self.width:
            print("\r" + " " * self.width + "\r", end="", file=sys.stderr, flush=True)
            self.width = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: without the program's name; default: those of the process.
    Returns:
        exit status: 0, 2 for bad input (one line on stderr says which), 1 where memory or a disk is full, 130 if
        interrupted.
    """
    parser = _arguments()
    args = parser.parse_args(arguments)
    progress = _Progress(sys.stderr.isatty() or getattr(args, "progress", False))
    try:
        status = args.command(args, progress)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of stdout has gone; nothing more can be said to it
        _drop_stdout()
        return 1
    except (OSError, ValueError, NotImplementedError, ImportError, MemoryError, RuntimeError) as error:
        progress.clear()
        if getattr(error, "errno", None) == errno.ENOSPC:
            where = error.filename or "stdout or a file"
            print(f"uncomp: {where} cannot be written ({error.strerror})", file=sys.stderr)
            _drop_stdout()
            return 1
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            print("uncomp: out of memory: take a shorter prompt, a smaller model or dtype", file=sys.stderr)
            return 1
        if not _is_bad_input(error):
            raise
        print(" ".join(str(error).split()), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        progress.clear()
        return 130


def _drop_stdout() -> None:
    """Nothing more is written to it, when the interpreter ends either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_bad_input(error: Exception) -> bool:
    """What this package refuses begins with its name; anything else is a fault and keeps its traceback."""
    return str(error).startswith("uncomp")


# ---- arguments
def _arguments() -> argparse.ArgumentParser:
    parser = _Parser(prog="uncomp", description=uncomp.__doc__)
    parser.add_argument("--version", action="version", version=f"uncomp {uncomp.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    info = commands.add_parser("info", help="what is installed and built", description="What is installed and built.")
    info.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    info.set_defaults(command=_info)
    cli_generate.add(commands)
    cli_calibrate.add(commands)
    cli_show.add(commands)
    cli_eval.add(commands)
    cli_report.add(commands)
    cli_study.add(commands)
    cli_votes.add(commands)
    cli_lorc.add(commands)
    return parser


# ---- commands
def _info(args: argparse.Namespace, progress: _Progress) -> int:
    from uncomp.hf.environment import environment

    found = {**uncomp.build_info(), **environment(), "policies": known_policies()}
    if args.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{name:<17} {'none' if text in ('', None) else text}")
    return 0
