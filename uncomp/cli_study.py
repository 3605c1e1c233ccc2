# SPDX-License-Identifier: Apache-2.0
"""`uncomp study`; its ratio: which share of a budget newest tokens should have beside heavy hitters."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uncomp import cli_orders
from uncomp.cli_options import add_command, add_json, add_machine, add_model, add_progress, add_texts


def add(commands: Any) -> None:
    """Adds the command to what argparse's add_subparsers returned."""
    text = "Studies of a model's heads over texts."
    study = add_command(commands, "study", text)
    kinds = study.add_subparsers(metavar="STUDY", required=True)
    cli_orders.add(kinds)
    text = "Share of newest tokens against heavy hitters, by the correlation of entropy trends over the layers."
    parser = add_command(kinds, "ratio", text, _ratio)
    add_model(parser)
    add_texts(parser)
    parser.add_argument("--samples", type=int, default=8, help="pieces of the text; default %(default)s")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens of a piece; default %(default)s")
    parser.add_argument("--budget", type=int, default=384, metavar="N", help="tokens a row keeps; default %(default)s")
    parser.add_argument("--shares", type=_shares, metavar="X,X,...", help="of newest tokens; default 0,0.1,...,1")
    parser.add_argument("--tensor", choices=("key", "value", "query"), default="key", help="default key")
    parser.add_argument("--seed", type=int, default=42, help="of the pieces; default %(default)s")
    add_machine(parser)
    parser.add_argument("--out", metavar="FILE", help="write what was found, with all curves, as JSON")
    add_json(parser)
    add_progress(parser)


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be shares like 0,0.25,0.5; got {text!r}") from None


def _ratio(args: argparse.Namespace, progress: Any) -> int:
    from uncomp.calibration import files
    from uncomp.calibration import texts as sources

    texts = sources.read_texts(args.text)  # before the model: it may take minutes
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f'uncomp study: out "{args.out}" lies in no folder that exists')

    from uncomp.hf.environment import best_device, best_dtype, quiet

    device = best_device(args.device)
    quiet(silent=not progress.shown)
    from uncomp.calibration.recent import SHARES, study_recent_share
    from uncomp.hf.load import load_model

    progress("loading")
    model, tokenizer = load_model(args.model, dtype=best_dtype(args.dtype, device), device=device)
    study = study_recent_share(
        model,
        tokenizer,
        texts,
        samples=args.samples,
        seqlen=args.seqlen,
        budget=args.budget,
        shares=SHARES if args.shares is None else args.shares,
        tensor=args.tensor,
        seed=args.seed,
        progress=progress,
    )
    progress.clear()
    found = {**asdict(study), "best_share": None if study.best is None else study.shares[study.best]}
    if args.out is not None:
        files.replace_file(args.out, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found) if args.json else _lines(study))
    return 0


def _lines(study: Any) -> str:
    lines = [
        f"{study.samples} samples of {study.seqlen} tokens, {study.budget} stay; entropy of the {study.tensor}",
        f"{'newest':>8} {'tokens':>8} {'heavy':>8} {'correlation':>12}",
    ]
    for i, (share, recent, found) in enumerate(zip(study.shares, study.recent, study.correlation, strict=True)):
        shown = "-" if found is None else f"{found:.4f}"
        mark = "  chosen" if i == study.best else ""
        lines.append(f"{share:>8.3g} {recent:>8} {study.budget - recent:>8} {shown:>12}{mark}")
    return "\n".join(lines)
