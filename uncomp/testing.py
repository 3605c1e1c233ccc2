# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks share: the tolerance table, seeds, makers of ragged arenas with poisoned dead slots."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

ENTROPY_TOLERANCE = {  # absolute, on the normalised entropy; the Gram matrix is summed in fp32
    torch.float64: 1e-6,
    torch.float32: 1e-5,
    torch.float16: 1e-4,
    torch.bfloat16: 1e-4,
}
EIGENVALUE_TOLERANCE = 5e-7  # absolute, of an eigenvalue of a trace-one matrix given exactly
LSE_TOLERANCE = 1e-4  # absolute; fp32 sums of up to 1M terms
SCORE_TOLERANCE = 2e-3  # share of the largest score; exp2 and half-precision products
MASS_TOLERANCE = 1e-3  # share of the whole mass of a row
ATTENTION_FLOOR = {  # relative Frobenius distance granted on top of twice what torch itself is off
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 3e-3,
}


_TINY = {  # smallest configs that have what is special about a family
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"sliding_window": None},
    "granite": {"attention_multiplier": 0.125, "residual_multiplier": 0.9, "embedding_multiplier": 2.0},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 16,
        "query_pre_attn_scalar": 64,
    },
}


def tiny_model_types() -> list[str]:
    """Model types that `tiny_model` builds."""
    return list(_TINY)


def tiny_model(model_type: str = "llama", *, seed: int = 0, **overrides):
    """A causal language model of random weights, small enough for a test; needs transformers.

    Args:
        model_type: one of `tiny_model_types()`.
        seed: of the weights.
        overrides: fields of its config.
    Returns:
        a model in eval mode whose generate never stops early (no end-of-text token); pad id 0, vocabulary 199.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type == "phi3":  # its rotary embedding takes the head dim from the widths
        sizes |= {"hidden_size": 8 * 64}
        del sizes["head_dim"]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**sizes, **_TINY[model_type], **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # attention that looks at something: random weights of the usual size are almost uniform
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
                weight.mul_(6.0)
    return model


def tiny_tokenizer():
    """A tokenizer that gives every byte a token, 260 in all; for `tiny_model(vocab_size=260)`; needs transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "<end>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def tiny_folder(folder):
    """A tiny Llama of random weights and its tokenizer, saved as an ordinary model folder; needs transformers.

    Args:
        folder: where; made if missing.
    Returns:
        the folder.
    """
    tiny_model("llama", vocab_size=260, num_hidden_layers=2, head_dim=16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def example_model():
    """The model that notebooks run on: SmolLM2-135M where it is installed, else a tiny one of random weights.

    Returns:
        (model in eval mode in float32 on the CPU, its tokenizer, its name); needs transformers.
    """
    from uncomp.hf.load import load_model

    try:
        return *load_model("smollm2-135m", dtype="float32"), "smollm2-135m"
    except (FileNotFoundError, ImportError):
        model = tiny_model("llama", vocab_size=260, num_hidden_layers=6)
        return model, tiny_tokenizer(), "a tiny model of random weights"


def example_folder(folder):
    """What `--model` takes in examples: smollm2-135m where it is installed, else a tiny model saved under `folder`."""
    from uncomp.hf.load import load_model

    try:
        load_model("smollm2-135m")
    except (FileNotFoundError, ImportError, ValueError):
        return tiny_folder(folder)
    return "smollm2-135m"


def example_text() -> str:
    """English prose that is on every machine: the language reference inside Python, about 450 000 characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius distance as a share of the norm of `want`; NaN where either holds NaN."""
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


@dataclass
class RaggedArena:
    """An arena as the operators see it, plus the rows it was made from."""

    key_rows: Tensor  # [C, Dk]
    value_rows: Tensor  # [C, Dv]
    slot_position: Tensor  # [C] int32
    row_start: Tensor  # [R + 1] int32
    row_len: Tensor  # [R] int32

    @property
    def rooms(self) -> list[int]:
        """Slots of every row."""
        starts = self.row_start.tolist()
        return [b - a for a, b in itertools.pairwise(starts)]

    def live(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row's live tokens."""
        start, length = int(self.row_start[row]), int(self.row_len[row])
        return self.key_rows[start : start + length], self.value_rows[start : start + length]


def make_arena(
    lengths: list[int],
    *,
    rooms: list[int] | None = None,
    key_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    poison: bool = True,
) -> RaggedArena:
    """Random rows of the given lengths; dead slots hold NaN and absurd positions unless `poison` is off.

    Args:
        lengths: tokens of each row.
        rooms: slots of each row; default: the length.
    """
    generator = torch.Generator().manual_seed(seed)
    rooms = list(lengths) if rooms is None else rooms
    starts = [0]
    for room in rooms:
        starts.append(starts[-1] + room)
    capacity, value_dim = starts[-1], key_dim if value_dim is None else value_dim
    keys = torch.randn(capacity, key_dim, generator=generator)
    values = torch.randn(capacity, value_dim, generator=generator)
    positions = torch.full((capacity,), 2**31 - 1, dtype=torch.int64)
    for row, length in enumerate(lengths):
        start, end = starts[row], starts[row + 1]
        spread = torch.randperm(4 * max(length, 1), generator=generator)[:length].sort().values
        positions[start : start + length] = spread
        if poison:
            keys[start + length : end] = float("nan")
            values[start + length : end] = float("nan")
    return RaggedArena(
        keys.to(device, dtype),
        values.to(device, dtype),
        positions.to(device, torch.int32),
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )
