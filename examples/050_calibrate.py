# SPDX-License-Identifier: Apache-2.0
"""Measures the heads of a model over a text once, keeps the profile, and generates with it; a tiny random model.

With `--model smollm2-135m --text FILE` it is a real one. The command line does the same: `uncomp calibrate`.
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch

import uncomp
from uncomp.testing import tiny_model


class Letters:
    """The tokenizer of the tiny model: a byte is a token."""

    bos_token_id = None

    def __call__(self, text, **_):
        """As a tokenizer of transformers is called."""
        return {"input_ids": [byte % 190 + 3 for byte in text.encode()]}


def main():
    """Calibrates, prints what the profile says, and compares its order with the one of a prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: a tiny Llama with random weights")
    parser.add_argument("--text", help="a UTF-8 file; default: random letters")
    args = parser.parse_args()
    if args.model:
        from uncomp.hf.load import load_model

        model, tokenizer = load_model(args.model, dtype="float32")
    else:
        model, tokenizer = tiny_model("llama"), Letters()
    letters = "".join(random.Random(0).choices("abcdefgh ijklmnop\n", k=4000))
    text = Path(args.text).read_text(encoding="utf-8") if args.text else letters

    with tempfile.TemporaryDirectory() as folder:
        # 1. One forward a sample; the file is what every later run needs. A killed run goes on where it was.
        path = Path(folder) / "profile.json"
        profile = uncomp.calibrate(model, tokenizer, text, samples=8, seqlen=256, out=path)
        print(f"profile of {profile.model}")
        print(f"{profile.run.samples} samples of {profile.run.seqlen} tokens, elbow at {profile.elbow} eigenvalues")
        for layer, heads in enumerate(profile.entropy):
            print(f"layer {layer}: entropy {min(heads):.3f} to {max(heads):.3f}, groups {profile.groups(layer, 2)}")
        print("order of two halves of the samples agrees to", profile.stability["query_head"]["model"])

        # 2. The profile decides which heads store more, instead of the prompt's own entropies.
        ids = torch.tensor([tokenizer(text)["input_ids"][:400]])
        with uncomp.patch(model, uncomp.UncompConfig(budget=48, profile=str(path))) as handle:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
            stats = handle.stats()
        print(f"stored tokens a head: {stats['stored_tokens_min']} to {stats['stored_tokens_max']}")

        # 3. It is refused for another model.
        try:
            uncomp.patch(tiny_model("qwen2"), uncomp.UncompConfig(profile=str(path)))
        except ValueError as error:
            print(error)


if __name__ == "__main__":
    main()
