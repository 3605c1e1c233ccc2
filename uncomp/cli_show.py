# SPDX-License-Identifier: Apache-2.0
"""`uncomp show`: the figures of one or several head profiles as files, and a few lines about them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uncomp.cli_options import add_command, add_json

if TYPE_CHECKING:
    from uncomp.calibration.profile import HeadProfile
    from uncomp.calibration.summary import HeadPlan


def add(commands: Any) -> None:
    """Adds the command to what argparse's add_subparsers returned."""
    text = "Draw head profiles: entropy, spectrum, layer curve, groups; several are compared."
    parser = add_command(commands, "show", text, run)
    parser.add_argument("profiles", nargs="+", metavar="PROFILE", help="files that `uncomp calibrate` wrote")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the figures; made if it is not there")
    parser.add_argument("--groups", type=int, metavar="G", help="groups of heads; default 8, or those of the shape")
    parser.add_argument("--group-scope", choices=("layer", "model"), help="default: layer where a layer has G rows")
    parser.add_argument("--rows", choices=("kv_head", "query_head"), default="kv_head", help="default %(default)s")
    parser.add_argument("--budget", type=int, default=384, metavar="N", help="mean tokens a row; default %(default)s")
    parser.add_argument("--shape", default="linear", help="budgets over the groups: linear (default) or a preset")
    stages = parser.add_mutually_exclusive_group()
    stages.add_argument("--threshold", type=float, help="drop of the curve that begins a stage; default min(1, Hq/32)")
    stages.add_argument("--stages", type=_starts, metavar="0,L,...", help="first layers of the stages instead")
    parser.add_argument("--format", default="png", help="png (default), svg, pdf, ...")
    add_json(parser)


def _starts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be layers like 0,2,15; got {text!r}")
    return [int(part) for part in parts]


def run(args: argparse.Namespace, progress: Any) -> int:
    """Draws everything first and writes then, so that bad input leaves no file."""
    from uncomp import figures
    from uncomp.calibration.summary import head_plan, likeness, profile_stages, summary

    ending = args.format.lower().lstrip(".")
    known = figures.formats()
    if ending not in known:
        raise ValueError(f"uncomp show: --format must be one of {', '.join(known)}; got {args.format!r}")
    profiles = _load(args.profiles)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f'uncomp show: --out must be a folder; "{out}" is a file')
    options = {"rows": args.rows, "scope": args.group_scope, "budget": args.budget, "shape": args.shape}
    plans = {label: head_plan(profile, args.groups, **options) for label, profile in profiles.items()}
    starts = {label: args.stages or profile_stages(profile, args.threshold) for label, profile in profiles.items()}
    drawn = _draw(profiles, plans, starts, progress)
    progress("writing")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figures.save(figure, out / f"{name}.{ending}")
    except OSError as error:
        raise ValueError(f'uncomp show: --out "{out}" cannot be written ({error.strerror})') from error
    values: dict[str, Any] = {
        "profiles": {
            label: {**summary(profile, plans[label]), "stages": starts[label]} for label, profile in profiles.items()
        },
        "files": [str(out / f"{name}.{ending}") for name in drawn],
    }
    if len(profiles) > 1:
        labels = list(profiles)
        alike = {other: likeness(profiles[labels[0]], profiles[other]) for other in labels[1:]}
        values["correlation"] = {"with": labels[0]} | {
            other: {"layer_mean": a.layer_mean, "model": a.model, "curve": a.curve} for other, a in alike.items()
        }
    progress.clear()
    print(json.dumps(values) if args.json else render(values))
    return 0


def _load(paths: list[str]) -> dict[str, HeadProfile]:
    """Profiles by file name, or by path where two files have one name."""
    from uncomp.calibration.profile import HeadProfile

    stems = [Path(path).name.removesuffix(".json") for path in paths]
    labels = stems if len(set(stems)) == len(stems) else [path.removesuffix(".json") for path in paths]
    if len(set(labels)) < len(labels):
        raise ValueError(f"uncomp show: every profile must be another file; got {', '.join(paths)}")
    found = {}
    for label, path in zip(labels, paths, strict=True):
        try:
            found[label] = HeadProfile.load(path)
        except OSError as error:
            if str(error).startswith("uncomp"):
                raise
            raise ValueError(f'uncomp show: profile "{path}" cannot be read ({error.strerror})') from error
    return found


def _draw(
    profiles: dict[str, HeadProfile], plans: dict[str, HeadPlan], starts: dict[str, list[int]], progress: Any
) -> dict[str, Any]:
    """Figures by file name without ending."""
    from uncomp import figures

    several = len(profiles) > 1
    first = next(iter(profiles))
    together = profiles if several else profiles[first]
    same = starts[first] if all(found == starts[first] for found in starts.values()) else None
    progress("drawing")
    drawn = {"correlation": figures.correlation(profiles)} if several else {}
    drawn |= {"spectrum": figures.spectrum_decay(together), "curve": figures.layer_curve(together, same)}
    for label, profile in profiles.items():
        before = label.replace("/", "-").replace("\\", "-").strip("-.") + "-" if several else ""
        drawn[f"{before}entropy"] = figures.entropy_map(profile)
        drawn[f"{before}groups"] = figures.group_map(profile, plans[label])
    return drawn


def render(values: dict[str, Any]) -> str:
    """The lines that are printed, from what --json gives."""
    lines = []
    for label, found in values["profiles"].items():
        model, run, entropy, groups = (found[key] for key in ("model", "run", "entropy", "groups"))
        of = "variance" if run["kind"] == "variance" else "entropy"
        lines += [
            f"{label}: {model['type']}, {model['L']} layers, {model['Hq']} query heads, {model['Hkv']} KV heads, "
            f"head dim {model['D']}",
            f"  measured   {run['tensor']} states, {run['samples']} texts of {run['seqlen']} tokens, k {run['k']}, "
            f"{run['kind']}, seed {run['seed']}",
            f"  {of:<10} {entropy['min']:.3f} to {entropy['max']:.3f}, mean {entropy['mean']:.3f}; "
            f"lowest in layer {entropy['lowest_layer']}, highest in layer {entropy['highest_layer']}",
            f"  elbow      {found['elbow']} of {model['D']} eigenvalues",
        ]
        shares = ", ".join(f"{100 * share:.0f} % with {count} groups" for count, share in found["certainty"].items())
        if shares:
            lines.append(f"  certainty  rows in the group that one text gives them: {shares}")
        stable = found.get("stability", {}).get("kv_head", {})
        known = [f"{value:.3f} {where}" for where, value in stable.items() if value is not None]
        if known:
            lines.append(
                f"  stability  rank correlation of two halves of the texts, layer and model: {', '.join(known)}"
            )
        lines.append(f"  stages     begin at layers {', '.join(map(str, found['stages']))}")
        tokens = ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in groups["tokens"])
        where = "in each layer" if groups["scope"] == "layer" else "over the model"
        rows = "KV heads" if groups["rows"] == "kv_head" else "query heads"
        lines.append(f"  groups     {groups['count']} of {rows} {where}; tokens a row, lowest entropy first: {tokens}")
    for other, alike in values.get("correlation", {}).items():
        if other != "with":
            lines.append(
                f"{other} against {values['correlation']['with']}: rank correlation {alike['layer_mean']:.3f} in a "
                f"layer, {alike['model']:.3f} over the model, {alike['curve']:.3f} of the layer curves"
            )
    return "\n".join([*lines, *(f"wrote {path}" for path in values["files"])])
