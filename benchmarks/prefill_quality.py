# SPDX-License-Identifier: Apache-2.0
"""What a prompt loses when its tokens leave between stages of layers: loss of its continuation, and a needle in it.

    python benchmarks/prefill_quality.py --model DIR --text FILE --stages 0,6,12,18 --contexts 4096 --json rows.json

Every way is fed the same pieces: the stock model; pruned prompts, with a full cache and with a compressed one; the
compressed cache alone; and, to see what choosing earns, prompts that are pruned to their newest tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))

from uncomp import PrefillPruning, UncompConfig, pruning
from uncomp.eval import perplexity

BUDGET, CONTINUATION = 384, 128
NEEDLE = " The secret number of the old lighthouse is {}."
QUESTION = (
    "\n\nQuestion: What is the secret number of the old lighthouse?\nAnswer: The secret number of the old lighthouse"
)
NUMBERS = ("48291", "70563", "15934", "92647", "36708")


def ways(prefill: PrefillPruning, budget: int = BUDGET) -> dict[str, UncompConfig | None]:
    """Configurations by name; "newest" is pruned by tokens_by_age."""
    return {
        "stock": None,
        "pruned": UncompConfig(policy="full", prefill=prefill),
        f"budget {budget}": UncompConfig(budget=budget),
        f"pruned, budget {budget}": UncompConfig(budget=budget, prefill=prefill),
        "newest": UncompConfig(policy="full", prefill=prefill),
    }


def tokens_by_age(query: Tensor, key: Tensor, scale: float, queries: int, lengths: Any) -> Tensor:
    """Scores that keep the newest tokens, in the place of uncomp.pruning.token_scores."""
    age = torch.arange(key.shape[2], dtype=torch.float32, device=key.device)
    return age.expand(query.shape[0], -1).contiguous()


def haystack(ids: Tensor, tokenizer: Any, context: int, depth: float, number: str) -> tuple[Tensor, Tensor]:
    """A prompt of `context` tokens with a needle at this depth and the question at its end, and the answer behind it.

    Returns:
        [1, context] int64 and [1, C] int64; the answer's first token says nothing of the number.
    """

    def coded(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)

    needle, question, answer = coded(NEEDLE.format(number)), coded(QUESTION), coded(f" is {number}")
    hay = ids[: context - needle.numel() - question.numel()]
    if hay.numel() + needle.numel() + question.numel() != context:
        raise ValueError(f"the text must have at least {context} tokens; got {ids.numel()}")
    place = int(depth * hay.numel())
    return torch.cat([hay[:place], needle, hay[place:], question])[None], answer[None]


def rows(
    model: torch.nn.Module,
    tokenizer: Any,
    ids: Tensor,
    contexts: Sequence[int],
    configs: dict[str, UncompConfig | None],
    *,
    windows: int = 2,
    needles: int = 3,
) -> Iterator[dict]:
    """One row a context and way.

    loss: nats a token of the continuations, mean over the windows; found: share of needles of which every digit is the
    most likely token, by_depth each of them; needle_loss: nats a token of the answers; seconds: of all.

    Args:
        ids: [N] tokens of the text. windows: pieces whose continuation is scored. needles: depths and numbers.
    """
    depths = [(i + 0.5) / needles for i in range(needles)]
    for context in contexts:
        pieces = perplexity.windows(ids, context, CONTINUATION, windows)
        asked = [haystack(ids, tokenizer, context, depth, NUMBERS[i % len(NUMBERS)]) for i, depth in enumerate(depths)]
        for name, config in configs.items():
            begin, chosen = time.perf_counter(), pruning.token_scores
            pruning.token_scores = tokens_by_age if name == "newest" else chosen
            try:
                texts = [perplexity.score(model, *piece, config, mode="chunk") for piece in pieces]
                found = [perplexity.score(model, *each, config, mode="chunk") for each in asked]
            finally:
                pruning.token_scores = chosen
            exact = [
                bool((f.log_probs.argmax(-1).cpu() == answer[0, 1:]).all())
                for f, (_, answer) in zip(found, asked, strict=True)
            ]
            yield {
                "context": context,
                "way": name,
                "windows": windows,
                "loss": statistics.fmean(t.loss for t in texts),
                "losses": [t.loss for t in texts],
                "perplexity": math.exp(statistics.fmean(t.loss for t in texts)),
                "needles": needles,
                "found": sum(exact) / needles,
                "by_depth": dict(zip([f"{depth:.2f}" for depth in depths], exact, strict=True)),
                "needle_loss": statistics.fmean(f.loss for f in found),
                "stored_tokens": texts[0].stored_tokens_mean,
                "seconds": time.perf_counter() - begin,
            }


def table(found: Sequence[dict]) -> str:
    """Markdown."""
    lines = ["| context | way | stored tokens | loss | perplexity | needles found | loss of the number |"]
    lines.append("|" + " --- |" * 7)
    for row in found:
        hits = f"{round(row['found'] * row['needles'])} of {row['needles']}"
        cells = [str(row["context"]), row["way"], f"{row['stored_tokens']:.0f}", f"{row['loss']:.3f}"]
        cells += [f"{row['perplexity']:.2f}", hits, f"{row['needle_loss']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and after each row what has been measured so far to the JSON file."""
    from uncomp.cli_prefill import stages_of, tokens_of
    from uncomp.hf.environment import best_device, best_dtype
    from uncomp.hf.load import load_model

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder, .gguf file or name")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 file to cut prompts from")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--windows", type=int, default=2, help="continuations a context")
    parser.add_argument("--needles", type=int, default=3, help="needles a context")
    parser.add_argument("--stages", type=stages_of, default="profile", help="first layers of the stages")
    parser.add_argument("--profile", help="whose curve gives the stages")
    parser.add_argument("--n-min", type=tokens_of, default=1536)
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--ways", nargs="+", help="only these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = best_device(None)
    model, tokenizer = load_model(options.model, dtype=best_dtype("auto", device), device=device)
    text = options.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    prefill = PrefillPruning(stages=options.stages, profile=options.profile, n_min=options.n_min)
    configs = ways(prefill, options.budget)
    if options.ways:
        configs = {name: configs[name] for name in options.ways}
    measured = []
    numbers = {"windows": options.windows, "needles": options.needles}
    for row in rows(model, tokenizer, ids, options.contexts, configs, **numbers):
        measured.append({**row, "model": options.model, "device": device, "prefill": prefill.to_dict()})
        print(table([row]).splitlines()[-1], f"{row['seconds']:.0f} s", file=sys.stderr, flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
