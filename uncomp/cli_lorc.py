# SPDX-License-Identifier: Apache-2.0
"""`uncomp lorc`: a model in, a folder of the model with key and value projections of low rank out."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from uncomp.cli_options import add_command, add_json, add_machine, add_model, add_progress

BAD = "uncomp lorc"


def add(commands: Any) -> None:
    """Adds the command."""
    text = "Write a model whose key and value projections are of low rank."
    parser = add_command(commands, "lorc", text, _lorc)
    add_model(parser)
    parser.add_argument(
        "--rho", type=_shares, default=0.575, metavar="R", help="mean share of channels kept, or R,R of keys and values"
    )
    parser.add_argument("--d-min-frac", type=float, default=0.25, help="least share in a layer; default %(default)s")
    parser.add_argument(
        "--schedule",
        choices=("cumulative_condition", "linear", "uniform"),
        default="cumulative_condition",
        help="of the ranks over the layers; default %(default)s",
    )
    parser.add_argument("--kappa", choices=("layer", "per_head_mean"), default="layer", help="default %(default)s")
    parser.add_argument("--threshold", type=float, help="leave layers whose cumulative condition lies further above")
    parser.add_argument("--rank-k", type=_ranks, metavar="R", help="ranks of keys, one or one a layer: 64 or 64,48,...")
    parser.add_argument("--rank-v", type=_ranks, metavar="R", help="ranks of values, likewise")
    parser.add_argument(
        "--granularity", default="head", metavar="G", help="what has factors of its own: head, group:S or layer"
    )
    parser.add_argument("--svd", choices=("exact", "randomised"), default="exact", help="default %(default)s")
    parser.add_argument("--whiten", nargs="+", metavar="FILE", help="calibrate on these UTF-8 texts, or wikitext2")
    parser.add_argument("--samples", type=int, default=32, help="pieces of the texts; default %(default)s")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens of a piece; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of pieces and of the randomised SVD; default %(default)s")
    add_machine(parser, "of the weights: auto (default: as saved), float32, ...")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    add_json(parser)
    add_progress(parser)


def _shares(text: str) -> float | tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a share like 0.575, or two; got {text!r}") from None
    return found if len(found) > 1 else found[0]


def _ranks(text: str) -> int | tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a rank like 64, or one a layer; got {text!r}") from None
    return found if len(found) > 1 else found[0]


def _lorc(args: argparse.Namespace, progress: Any) -> int:
    from uncomp.transforms.lorc.config import LorcConfig
    from uncomp.transforms.lorc.files import check_target, is_checkpoint

    fields = ("rho", "d_min_frac", "schedule", "kappa", "threshold", "rank_k", "rank_v", "granularity", "svd", "seed")
    whiten = None if args.whiten is None else "calib"
    config = LorcConfig(**{name: getattr(args, name) for name in fields}, whiten=whiten)
    check_target(args.out)  # and the texts: before the model, which may take minutes
    for name, least in (("samples", 1), ("seqlen", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"{BAD}: --{name} must be at least {least}; got {getattr(args, name)}")
    texts = None
    if args.whiten is not None:
        from uncomp.calibration.texts import read_texts

        texts = read_texts(args.whiten)

    from uncomp.hf.environment import best_device, quiet

    device = best_device(args.device)
    quiet(silent=not progress.shown)
    from uncomp.hf.load import load_model
    from uncomp.transforms.lorc.apply import compress

    if is_checkpoint(args.model):
        raise ValueError(f'{BAD}: model "{args.model}" is compressed already')
    progress("loading")
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=device)
    tokens = None if texts is None else _pieces(tokenizer, texts, args)
    started = time.monotonic()
    handle = compress(model, config, calibration=tokens, keep_weights=False, progress=progress)
    seconds = time.monotonic() - started
    handle.save_pretrained(args.out, tokenizer)
    progress.clear()
    values = {"out": args.out, "config": config.to_dict(), "seconds": round(seconds, 2), **handle.stats()}
    print(json.dumps(values) if args.json else _lines(values))
    return 0


def _pieces(tokenizer: Any, texts: list[str], args: argparse.Namespace) -> Any:
    """[samples, seqlen] int64, evenly spread over the joined texts."""
    import torch

    ids = torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])
    spare = ids.numel() - args.seqlen
    if spare < 0:
        raise ValueError(f"{BAD}: --whiten must hold at least {args.seqlen} tokens (--seqlen); got {ids.numel()}")
    starts = [i * spare // max(args.samples - 1, 1) for i in range(args.samples)]
    return torch.stack([ids[start : start + args.seqlen] for start in starts])


def _lines(values: dict[str, Any]) -> str:
    def shown(ranks: list[int | None]) -> str:
        return " ".join("-" if rank is None else str(rank) for rank in ranks)

    before, after = (values[f"weight_bytes_{when}"] / 2**20 for when in ("before", "after"))
    rows = [
        ("ranks of keys", shown(values["rank_k"])),
        ("ranks of values", shown(values["rank_v"])),
        ("channels kept", f"{100 * values['kept_share']:.2f} %"),
        ("projections", f"{before:.2f} to {after:.2f} MiB"),
        ("time", f"{values['seconds']:.2f} s"),
        ("written", values["out"]),
    ]
    return "\n".join(f"{name:<18} {value}" for name, value in rows)
