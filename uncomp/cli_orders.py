# SPDX-License-Identifier: Apache-2.0
"""`uncomp study order`: what the order of the heads is worth at one budget."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uncomp.cli_options import add_command, add_json, add_machine, add_model, add_progress

BAD = "uncomp study order"


def add(kinds: Any) -> None:
    """Adds the study to the subparsers of `uncomp study`."""
    text = (
        "Loss of continuations after a compressed prefix: heads ordered by profile, prompt, reversed, by lot, evenly."
    )
    parser = add_command(kinds, "order", text, _order)
    add_model(parser)
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="UTF-8 files other than the profile's")
    parser.add_argument("--profile", required=True, help="file or name of a profile of the model")
    parser.add_argument("--budget", type=int, default=256, metavar="N", help="mean tokens a row keeps; default 256")
    parser.add_argument("--groups", type=int, default=8, help="groups of heads; default %(default)s")
    parser.add_argument("--group-scope", choices=("layer", "model"), default="model", help="default %(default)s")
    parser.add_argument("--prefix", type=int, default=2048, help="tokens that are compressed; default %(default)s")
    parser.add_argument("--continuation", type=int, default=256, help="tokens that are scored; default %(default)s")
    parser.add_argument("--pieces", type=int, default=4, help="of the text; default %(default)s")
    parser.add_argument("--draws", type=int, default=2, help="random orders; default %(default)s")
    add_machine(parser)
    parser.add_argument("--out", metavar="FILE", help="write what was found as JSON")
    add_json(parser)
    add_progress(parser)


def _order(args: argparse.Namespace, progress: Any) -> int:
    from uncomp.calibration import files, orders
    from uncomp.calibration import texts as sources

    texts = sources.read_texts(args.text)  # before the model: it may take minutes
    if not files.locate(args.profile).is_file():
        raise ValueError(f'{BAD}: --profile "{args.profile}" is no file')
    for name, least in (("prefix", 1), ("continuation", 2), ("pieces", 1), ("draws", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"{BAD}: --{name} must be at least {least}; got {getattr(args, name)}")
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f'{BAD}: --out "{args.out}" lies in no folder that exists')

    from uncomp.hf.environment import best_device, best_dtype, quiet

    device = best_device(args.device)
    quiet(silent=not progress.shown)
    import torch

    from uncomp.hf.load import load_model

    progress("loading")
    model, tokenizer = load_model(args.model, dtype=best_dtype(args.dtype, device), device=device)
    ids = torch.tensor(tokenizer("\n\n".join(texts), verbose=False)["input_ids"], dtype=torch.int64)
    options = {name: getattr(args, name) for name in ("budget", "groups", "prefix", "continuation", "pieces", "draws")}
    found = orders.study_orders(model, ids, args.profile, **options, scope=args.group_scope, progress=progress)
    progress.clear()
    values = {
        **options,
        "scope": args.group_scope,
        "profile": args.profile,
        "orders": [{**asdict(each), "perplexity": each.perplexity} for each in found],
    }
    if args.out is not None:
        files.replace_file(args.out, (json.dumps(values, indent=1) + "\n").encode())
    print(json.dumps(values) if args.json else _lines(values))
    return 0


def _lines(values: dict[str, Any]) -> str:
    lines = [
        f"{values['pieces']} prefixes of {values['prefix']} tokens, {values['continuation']} scored behind each; "
        f"{values['groups']} groups, scope {values['scope']}",
        f"{'order':<8} {'stored':>8} {'of prefix':>10} {'loss':>8} {'over full':>10} {'perplexity':>11} "
        f"{'agreement':>10} {'KL':>8}",
    ]
    for each in values["orders"]:
        over, share = sum(each["over_full"]) / len(each["over_full"]), 100 * each["share"]
        lines.append(
            f"{each['order']:<8} {each['stored']:>8.1f} {share:>8.1f} % {each['loss']:>8.4f} {over:>10.4f} "
            f"{each['perplexity']:>11.3f} {100 * each['agreement']:>8.1f} % {each['divergence']:>8.4f}"
        )
    return "\n".join(lines)
