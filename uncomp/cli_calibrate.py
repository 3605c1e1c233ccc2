# SPDX-License-Identifier: Apache-2.0
"""`uncomp calibrate`: text files and a model in, a profile of its heads out."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from uncomp.cli_options import add_command, add_json, add_machine, add_model, add_progress, add_texts

BAD = "uncomp calibrate"


def add(commands: Any) -> None:
    """Adds the command."""
    text = "Measure the heads of a model over texts and write a profile."
    parser = add_command(commands, "calibrate", text, _calibrate)
    add_model(parser)
    add_texts(parser)
    parser.add_argument("--samples", type=int, default=100, help="pieces of the text; default %(default)s")
    parser.add_argument("--seqlen", type=int, default=4096, help="tokens of a piece; default %(default)s")
    parser.add_argument("--tensor", choices=("query", "key", "value", "hidden"), default="query", help="default query")
    parser.add_argument("--rope", choices=("after", "before"), default="after", help="of the rotation; default after")
    parser.add_argument(
        "--top-eigenvalues", type=_top, metavar="K", help="a number, elbow or all; default head_dim / 4"
    )
    parser.add_argument(
        "--kind",
        choices=("truncated", "renormalized", "renyi2", "variance"),
        default="truncated",
        help="of the entropy, default truncated; variance ranks heads by the variance of their states instead",
    )
    parser.add_argument("--groups", type=int, help="print the heads of every layer in so many groups")
    parser.add_argument("--batch-size", type=int, default=1, help="pieces a forward; default %(default)s")
    parser.add_argument("--seed", type=int, default=42, help="of the pieces; default %(default)s")
    add_machine(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the profile; a killed run goes on from FILE.state"
    )
    add_json(parser)
    add_progress(parser)


def _top(text: str) -> int | str:
    if text in ("elbow", "all"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, elbow or all; got {text!r}") from None


def _calibrate(args: argparse.Namespace, progress: Any) -> int:
    from uncomp.calibration import texts as sources

    texts = sources.read_texts(args.text)  # before the model: it may take minutes
    for name, least in (("samples", 1), ("seqlen", 2), ("batch_size", 1), ("seed", 0)):
        if getattr(args, name) < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{BAD}: {option} must be at least {least}; got {getattr(args, name)}")

    from uncomp.hf.environment import best_device, best_dtype, quiet

    device = best_device(args.device)
    quiet(silent=not progress.shown)
    from uncomp.calibration.collect import calibrate, facts_of
    from uncomp.hf.load import load_model

    progress("loading")
    model, tokenizer = load_model(args.model, dtype=best_dtype(args.dtype, device), device=device)
    facts = facts_of(model)
    if args.groups is not None and not 1 <= args.groups <= facts.Hq:
        raise ValueError(f"{BAD}: --groups must lie in [1, {facts.Hq}], the query heads of a layer; got {args.groups}")
    started = time.monotonic()
    profile = calibrate(
        model,
        tokenizer,
        texts,
        samples=args.samples,
        seqlen=args.seqlen,
        tensor=args.tensor,
        rope=args.rope,
        top=args.top_eigenvalues,
        kind=args.kind,
        batch_size=args.batch_size,
        seed=args.seed,
        out=args.out,
        progress=progress,
    )
    seconds = time.monotonic() - started
    progress.clear()
    found = _values(profile, args, seconds)
    print(json.dumps(found) if args.json else _lines(found))
    return 0


def _values(profile: Any, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    facts, run = profile.model, profile.run
    values = {
        "out": args.out,
        "model": str(facts),
        "samples": run.samples,
        "seqlen": run.seqlen,
        "tensor": run.tensor,
        "rope": run.rope,
        "k": run.k,
        "elbow": profile.elbow,
        "seconds": round(seconds, 2),
        "statistic": "variance" if run.kind == "variance" else "entropy",
        "entropy": [round(sum(heads) / len(heads), 6) for heads in profile.entropy],
        "stability": profile.stability,
    }
    if args.groups is not None and run.tensor != "hidden":
        rows = "kv_head" if args.groups <= facts.Hkv else "query_head"
        values["rows"] = rows
        values["groups"] = [profile.groups(layer, args.groups, rows) for layer in range(facts.L)]
    return values


def _lines(values: dict[str, Any]) -> str:
    stable = values["stability"]["query_head"]
    shown = ["-" if r is None else f"{r:.3f}" for r in (stable["layer"], stable["model"])]
    lines = [
        f"{'model':<18} {values['model']}",
        f"{'samples':<18} {values['samples']} of {values['seqlen']} tokens in {values['seconds']:.1f} s",
        f"{'eigenvalues kept':<18} {values['k']} (elbow {values['elbow']})",
        f"{values['statistic'] + ' by layer':<18} {min(values['entropy']):.4f} to {max(values['entropy']):.4f}",
        f"{'order of halves':<18} rank correlation {shown[0]} in a layer, {shown[1]} over the model",
    ]
    for layer, ids in enumerate(values.get("groups", ())):
        lines.append(f"{f'layer {layer}':<18} {' '.join(map(str, ids))}")
    return "\n".join([*lines, f"{'written':<18} {values['out']}"])
