# SPDX-License-Identifier: Apache-2.0
"""`uncomp generate`: one prompt under a compressed cache, and beside it the full one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from uncomp import cli_prefill
from uncomp.calibration import files
from uncomp.cli_options import add_command, add_json, add_machine, add_model, add_progress
from uncomp.config import UncompConfig, known_policies


def add(commands: Any) -> None:
    """Adds the command."""
    text = "Generate greedily with a compressed cache."
    parser = add_command(commands, "generate", text, _generate)
    _model_arguments(parser)
    _cache_arguments(parser)
    cli_prefill.add(parser)


# ---- arguments
def _model_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the prompt itself")
    prompt.add_argument("--prompt-file", help="a UTF-8 file that holds it")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument("--min-new-tokens", type=int, default=0, help="no end of text before these; default 0")
    add_machine(parser, "auto (default: as saved, float32 on a CPU slow at it), float32, float16, bfloat16")
    parser.add_argument("--compare", action="store_true", help="run the full cache too and print both")
    parser.add_argument("--figure", metavar="FILE", help="draw entropy, stored tokens and bytes (needs matplotlib)")
    add_json(parser)
    add_progress(parser)


def _cache_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cache", "left out: the default of the policy (docs/policies.md)")
    group.add_argument("--policy", default="uncomp", help=f"{', '.join(known_policies())}; default %(default)s")
    group.add_argument("--budget", type=_budget, metavar="N|SHARE", help="mean tokens a row keeps, or 0.0938 of them")
    group.add_argument("--groups", type=int, help="groups of heads")
    group.add_argument("--group-scope", choices=("layer", "model"), help="where heads are grouped")
    group.add_argument("--order", choices=("ascending", "reverse", "random"), help="of the groups; two are ablations")
    group.add_argument(
        "--shape", type=_shape, help='budgets over the groups: linear, a preset, entropy, or "128,256,..."'
    )
    group.add_argument("--extreme", type=int, metavar="N", help="tokens of the lower of two groups")
    group.add_argument("--delete-heads", type=int, metavar="N", help="rows of each layer that store nothing")
    group.add_argument(
        "--entropy-kind",
        choices=("truncated", "renormalized", "renyi2", "variance"),
        help="what heads are ordered by; default truncated",
    )
    group.add_argument("--profile", help="a calibrated profile, by file or name, instead of this prompt's entropies")
    group.add_argument("--preset", choices=("tuned", "tuned-hits"), help="a combination of settings under one name")
    group.add_argument("--window", type=int, help="newest tokens, which score and stay")
    group.add_argument("--sinks", type=int, help="first tokens that stay")
    group.add_argument("--rows", choices=("kv_head", "query_head"), help="what has a budget of its own")
    group.add_argument("--decode", choices=("evict", "grow"), help="constant length, or new tokens are appended")
    group.add_argument("--skip-sliding", action="store_true", default=None, help="accept sliding-window layers")
    group.add_argument("--seed", type=int, help="of --order random and --policy random")


_CONFIG = (
    "policy",
    "budget",
    "groups",
    "group_scope",
    "order",
    "shape",
    "profile",
    "preset",
    "window",
    "sinks",
    "rows",
)
_CONFIG += ("decode", "skip_sliding", "seed", "extreme", "delete_heads", "entropy_kind")


def _budget(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be whole tokens or a share like 0.0938; got {text!r}") from None


def _shape(text: str) -> str | tuple[int, ...]:
    parts = text.split(",")
    return tuple(int(part) for part in parts) if all(part.strip().isdigit() for part in parts) else text


# ---- the command
def _generate(args: argparse.Namespace, progress: Any) -> int:
    text = _prompt(args)
    given = {name: getattr(args, name) for name in _CONFIG if getattr(args, name) is not None}
    config = UncompConfig(**given, **cli_prefill.chosen(args))
    if args.profile not in (None, "online") and not files.locate(args.profile).is_file():
        raise ValueError(f'uncomp generate: profile "{args.profile}" is no file')
    if args.figure is not None:
        from uncomp import figures

        figures.check(args.figure)

    from uncomp.hf.environment import best_device, best_dtype, quiet

    device = best_device(args.device)
    quiet(silent=not progress.shown)
    from uncomp import generation
    from uncomp.hf.load import load_model

    progress("loading")
    model, tokenizer = load_model(args.model, dtype=best_dtype(args.dtype, device), device=device)
    ids = generation.encode(tokenizer, text, chat=args.chat)
    options = {"max_new_tokens": args.max_new_tokens, "progress": progress, "min_new_tokens": args.min_new_tokens}
    progress.label = config.policy
    report = generation.run(model, tokenizer, ids, config, **options)
    full = None
    if args.compare:
        progress.label = "full cache"
        full = generation.run(model, tokenizer, ids, None, **options)
    progress.clear()
    if args.figure is not None:
        figures.draw(report, args.figure, full=full)
    if args.json:
        print(json.dumps(_values(report, full)))
    else:
        print(render(report, full))
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        text, source = args.prompt, "--prompt"
    else:
        source = f'prompt file "{args.prompt_file}"'
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"uncomp generate: {source} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"uncomp generate: {source} is not UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"uncomp generate: {source} is empty")
    return text


# ---- what is printed
def _values(report: Any, full: Any) -> dict[str, Any]:
    from uncomp.generation import agreement

    values = report.to_dict()
    if full is not None:
        values["compare"] = {**full.to_dict(), "agreement": agreement(report, full)}
    return values


_LINES = (
    ("prompt tokens", lambda r: f"{r.prompt_tokens}"),
    ("new tokens", lambda r: f"{r.new_tokens}"),
    ("stored tokens", lambda r: f"{r.stored_tokens_mean:.1f} ({r.stored_tokens_min} to {r.stored_tokens_max})"),
    ("cache", lambda r: f"{r.cache_bytes / 2**20:.2f} MiB"),
    ("of the full cache", lambda r: f"{100 * r.cache_bytes / max(r.full_cache_bytes, 1):.2f} %"),
    ("prefill", lambda r: f"{r.prefill_seconds:.2f} s"),
    ("decode", lambda r: "-" if (v := r.decode_tokens_per_second) is None else f"{v:.2f} tokens/s"),
    ("peak memory", lambda r: "-" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.0f} MiB"),
)


def render(report: Any, full: Any = None) -> str:
    """What `uncomp generate` prints: the text, then a column of figures for each run."""
    runs = [report] if full is None else [report, full]
    lines = [f"[{run.policy}] {run.text}" for run in runs] if full is not None else [report.text]
    columns = [["", *(value(run) for _, value in _LINES)] for run in runs]
    for column, run in zip(columns, runs, strict=True):
        column[0] = run.policy if run.budget is None else f"{run.policy}, budget {run.budget}"
    widths = [max(map(len, column)) for column in columns]
    names = ["", *(name for name, _ in _LINES)]
    lines.append("")
    for i, name in enumerate(names):
        cells = (column[i].rjust(width) for column, width in zip(columns, widths, strict=True))
        lines.append(f"{name:<18} " + "   ".join(cells))
    if full is not None:
        from uncomp.generation import agreement

        lines.append(f"{'equal tokens':<18} {100 * agreement(report, full):.1f} %")
    return "\n".join(lines)
