# SPDX-License-Identifier: Apache-2.0
"""A policy of your own: keep the tokens whose values are longest, in a tiny model with random weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import uncomp


@uncomp.register_policy
class ValueNorm(uncomp.Policy):
    """s_j = the norm of token j's value; every row has the same budget."""

    name = "value_norm"
    defaults = {"pool_width": 1}  # noqa: RUF012

    def score(self, view):
        """[R, columns] float32, larger means keep."""
        return view.values.float().norm(dim=-1)


def main():
    """Generates with the policy and says what the cache holds."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    prompt = torch.randint(1, 256, (1, 300))
    with uncomp.patch(model, uncomp.UncompConfig(policy="value_norm", budget=64)) as handle:
        result = model.generate(
            prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, return_dict_in_generate=True
        )
        stats = handle.stats()
    print("new tokens:", result.sequences[0, 300:].tolist())
    print("stored in every row:", stats["stored_tokens_mean"], "of", stats["real_tokens"][0], "tokens")


if __name__ == "__main__":
    main()
