# SPDX-License-Identifier: Apache-2.0
"""`make demo`: a small real model reads this project's documentation and answers, with a full and a compressed cache.

Prints both answers, bytes and speeds, and draws entropy, stored tokens and bytes.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import uncomp
from uncomp import figures, generation
from uncomp.cli_generate import render
from uncomp.hf.environment import quiet

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("method", "architecture", "policies", "kernels", "glossary")))
QUESTION = "Which Python version is needed?"
LEAST = 6000  # prompt tokens


def prompt(tokenizer, tokens):
    """Token ids of the documentation, cut to so many tokens, with the question behind it."""
    text = "\n\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    pages = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:tokens]
    asked = f"{tokenizer.decode(pages)}\n\n---\n{QUESTION}"
    return generation.encode(tokenizer, asked, chat=True)


def main():
    """Runs both caches and prints them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--budget", type=int, default=384, help="mean tokens a head keeps")
    parser.add_argument("--tokens", type=int, default=6200, help="of the documentation")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--figure", default="build/demo.png")
    args = parser.parse_args()
    quiet()
    from uncomp.hf.load import load_model

    started = time.perf_counter()
    # Few CPUs multiply bfloat16 as fast as float32.
    dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    try:
        model, tokenizer = load_model(args.model, dtype=dtype, device=args.device)
    except FileNotFoundError as error:
        sys.exit(str(error))
    ids = prompt(tokenizer, args.tokens)
    if ids.shape[1] < LEAST:
        sys.exit(f"demo: the prompt must have at least {LEAST} tokens; got {ids.shape[1]}")
    print(f"{args.model}, {dtype} on {args.device}, {torch.get_num_threads()} threads; {ids.shape[1]} prompt tokens")
    print(f"question: {QUESTION}\n", flush=True)
    reports = []
    for name, config in (("full", None), ("compressed", uncomp.UncompConfig(budget=args.budget))):
        print(f"... {name} cache", file=sys.stderr, flush=True)
        length = {"min_new_tokens": min(24, args.new_tokens)}  # enough steps for a speed
        reports.append(generation.run(model, tokenizer, ids, config, args.new_tokens, **length))
    full, compressed = reports
    print(render(compressed, full))
    Path(args.figure).parent.mkdir(parents=True, exist_ok=True)
    title = f"{args.model}: {ids.shape[1]} tokens of documentation, mean budget {args.budget}"
    figures.draw(compressed, args.figure, full=full, title=title)
    print(f"\nfigure: {args.figure}; {time.perf_counter() - started:.0f} s altogether")


if __name__ == "__main__":
    main()
