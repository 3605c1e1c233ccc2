# SPDX-License-Identifier: Apache-2.0
"""`uncomp votes`: votes of a profile, of a JSON file or of a folder of tables; shown, and written in either form."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from uncomp.cli_options import add_command, add_json

BAD = "uncomp votes"


def add(commands: Any) -> None:
    """Adds the command."""
    text = "Show the votes of heads for groups, and write them as one JSON file or as a table a layer."
    parser = add_command(commands, "votes", text, _votes)
    parser.add_argument("source", help="a profile (file or name), a JSON file of votes, or a folder of tables")
    parser.add_argument("--groups", type=int, metavar="G", help="of a profile, 1 to its rows; votes say theirs")
    parser.add_argument("--rows", choices=("kv_head", "query_head"), help="of a profile; default query_head")
    parser.add_argument("--out", metavar="PATH", help="write them: NAME.json, or a folder of tables")
    add_json(parser)


def _votes(args: argparse.Namespace, progress: Any) -> int:
    found, kind = _read(args)
    if args.out is not None:
        _write(found, Path(args.out))
    values = {
        "source": args.source,
        "kind": kind,
        "layers": len(found.votes),
        "heads": len(found.votes[0]),
        "groups": len(found.votes[0][0]),
        "samples": found.samples,
        "group_ids": found.group_ids(),
        "out": args.out,
    }
    print(json.dumps(values) if args.json else _lines(values))
    return 0


def _read(args: argparse.Namespace) -> tuple[Any, str]:
    """Votes, and what they were read from."""
    from uncomp.calibration import files
    from uncomp.calibration.profile import HeadProfile
    from uncomp.calibration.votes import Votes

    path = files.locate(args.source)
    if not path.exists():
        raise ValueError(f'{BAD}: source "{args.source}" does not exist')
    if files.is_profile(path):
        profile = HeadProfile.load(args.source)
        rows = args.rows or "query_head"
        most = profile.model.Hkv if rows == "kv_head" else profile.model.Hq
        if args.groups is None or not 1 <= args.groups <= most:
            raise ValueError(f"{BAD}: --groups must lie in [1, {most}], the {rows} rows of a layer; got {args.groups}")
        return Votes(profile.votes(args.groups, rows), f"{profile.model}, {rows}"), "profile"
    for option, given in (("--groups", args.groups), ("--rows", args.rows)):
        if given is not None:
            raise ValueError(f"{BAD}: {option} must be left out for votes, which say theirs; got {given}")
    return Votes.load(path), "tables" if path.is_dir() else "votes"


def _write(found: Any, out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise ValueError(f'{BAD}: --out "{out}" lies in no folder that exists')
    if out.suffix == ".json":
        if out.is_dir():
            raise ValueError(f'{BAD}: --out "{out}" is a folder; a file was wanted')
        found.save(out)
    elif out.exists() and not out.is_dir():
        raise ValueError(f'{BAD}: --out "{out}" must be NAME.json or a folder; it is a file')
    else:
        found.save_tables(out)


def _lines(values: dict[str, Any]) -> str:
    samples = sorted(set(values["samples"]))
    lines = [
        f"{values['layers']} layers of {values['heads']} rows, {values['groups']} groups, "
        f"{' or '.join(map(str, samples))} samples"
    ]
    lines += [f"{f'layer {layer}':<10} {' '.join(map(str, ids))}" for layer, ids in enumerate(values["group_ids"])]
    return "\n".join([*lines, *([f"written    {values['out']}"] if values["out"] else [])])
