# SPDX-License-Identifier: Apache-2.0
"""A stock `generate` call on a patched model, and what its cache stores; without arguments a tiny random model.

With `--model smollm2-135m`, a folder or a hub name it is a real one.
"""

import argparse

import torch

import uncomp
from uncomp.testing import tiny_model


def main():
    """Prints what is stored while the model is patched, and that nothing is left of it afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: a tiny Llama with random weights")
    parser.add_argument("--prompt", default="The key/value cache of a language model holds, for every layer and head,")
    parser.add_argument("--budget", type=int, default=48, help="mean tokens a KV head keeps")
    args = parser.parse_args()
    if args.model:
        from uncomp.hf.load import load_model

        model, tokenizer = load_model(args.model)
        ids = tokenizer(8 * args.prompt, return_tensors="pt").input_ids
    else:
        model, tokenizer = tiny_model("llama"), None
        ids = torch.randint(3, 199, (1, 400), generator=torch.Generator().manual_seed(0))
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}

    # 1. Patch: from here on every generate, pipeline and forward of this model compresses its cache.
    with uncomp.patch(model, uncomp.UncompConfig(budget=args.budget)) as handle:
        out = model.generate(ids, return_dict_in_generate=True, **call)
        stats = handle.stats()

    # 2. What is stored: each KV head its own number of tokens.
    print(f"prompt of {ids.shape[1]} tokens, {stats['layers']} layers compressed by {stats['policy']}")
    low, high = stats["stored_tokens_min"], stats["stored_tokens_max"]
    print(f"stored tokens a head: {stats['stored_tokens_mean']:.1f} on average, {low} to {high}")
    share = 100 * stats["cache_bytes"] / stats["full_cache_bytes"]
    print(f"cache: {stats['cache_bytes']} bytes of {stats['full_cache_bytes']} ({share:.2f} %)")
    if tokenizer is not None:
        print(tokenizer.decode(out.sequences[0, ids.shape[1] :]))

    # 3. Behind the `with` it is the very same model; a budget that covers everything changes nothing either.
    stock = model.generate(ids, **call)
    with uncomp.patch(model, uncomp.UncompConfig(budget=1.0)):
        assert torch.equal(model.generate(ids, **call), stock)
    print("budget 1.0 gives the tokens of the unpatched model")


if __name__ == "__main__":
    main()
