# SPDX-License-Identifier: Apache-2.0
"""Several turns on one compressed cache, and one context asked twice through a fork."""

import argparse

import torch

import uncomp
from uncomp.testing import tiny_model


def turn(model, cache, seen, new):
    """Answers `new` behind everything that was seen; gives all tokens so far. The cache holds all but the last."""
    ids = torch.cat([seen, new], 1)
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False)


def show(name, cache):
    """One line: the model sees the logical length, the rows hold the stored one."""
    stats = uncomp.cache_stats(cache)
    low, high, seen = stats["stored_tokens_min"], stats["stored_tokens_max"], cache.get_seq_length()
    print(f"{name:<22} seen {seen:4d}   stored a head {low:3d} to {high:3d}   {stats['cache_bytes']} bytes")


def main():
    """Prints the cache after each turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: a tiny Llama with random weights")
    parser.add_argument("--budget", type=int, default=64, help="mean tokens a KV head keeps")
    args = parser.parse_args()
    if args.model:
        from uncomp.hf.load import load_model

        model, tokenizer = load_model(args.model)
        texts = ["The quick brown fox jumps over the lazy dog. " * 30, "\nWho jumps?", "\nOver whom?", "\nWhat colour?"]
        context, *questions = (tokenizer(text, return_tensors="pt").input_ids for text in texts)
    else:
        model, generator = tiny_model("llama"), torch.Generator().manual_seed(0)
        context, *questions = (torch.randint(3, 199, (1, n), generator=generator) for n in (300, 9, 7, 8))

    with uncomp.patch(model, uncomp.UncompConfig(budget=args.budget)) as handle:
        # 1. One cache, handed from turn to turn; each turn goes back to the budget.
        cache = handle.new_cache()
        seen = turn(model, cache, context, questions[0])
        show("first turn", cache)
        again = cache.fork()  # what follows happens to one of them
        longer = turn(model, cache, seen, questions[1])
        show("second turn", cache)

        # 2. The fork still stands at the first turn: another question about the same context, without its prefill.
        other = turn(model, again, seen, questions[2])
        show("second turn of a fork", again)
    print("answers differ" if not torch.equal(longer[:, -12:], other[:, -12:]) else "answers agree")


if __name__ == "__main__":
    main()
