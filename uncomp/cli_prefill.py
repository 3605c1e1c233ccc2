# SPDX-License-Identifier: Apache-2.0
"""Arguments of `uncomp generate` that say how a prompt is pruned, and the configuration they make."""

from __future__ import annotations

import argparse
from typing import Any

from uncomp.prefill import PrefillPruning

_FIELDS = ("stages", "n_min", "n_max", "n_step")


def add(parser: argparse.ArgumentParser) -> None:
    """Adds them to a command's arguments."""
    group = parser.add_argument_group("prefill", "tokens leave the prompt between stages of layers (docs/method.md)")
    group.add_argument(
        "--stages",
        type=stages_of,
        metavar="0,2,...",
        help="first layers of the stages, fixed (published, of 32 or 40 layers) or profile; turns pruning on",
    )
    group.add_argument("--n-min", type=tokens_of, metavar="N|SHARE", help="tokens of the last stage; default 1536")
    group.add_argument("--n-max", type=tokens_of, metavar="N|SHARE", help="tokens to fall from; default the prompt's")
    group.add_argument("--n-step", type=int, metavar="N", help="tokens fewer from stage to stage; default: evenly")


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The field `prefill` of a configuration, if the arguments say one.

    Raises:
        ValueError: numbers of tokens for a prompt that is not pruned.
    """
    given = {name: getattr(args, name) for name in _FIELDS if getattr(args, name) is not None}
    if not given:
        return {}
    if "stages" not in given and args.policy != "uncomp_stage":
        flag = "--" + next(iter(given)).replace("_", "-")
        raise ValueError(f"uncomp generate: {flag} needs --stages or --policy uncomp_stage; got neither")
    return {"prefill": PrefillPruning(**given)}


def stages_of(text: str) -> str | tuple[int, ...]:
    """Layers, where the text is a list of them."""
    parts = [part.strip() for part in text.split(",")]
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else text


def tokens_of(text: str) -> int | float:
    """Whole tokens, or a share."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise argparse.ArgumentTypeError(f"must be whole tokens or a share like 0.25; got {text!r}")
