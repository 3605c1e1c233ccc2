# SPDX-License-Identifier: Apache-2.0
"""How a token is chosen from logits, on the device; which options a call and the model's defaults give."""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLDEST = 1e-4  # temperature below which logits overflow
# What stock generate reads from a model's generation_config and this loop does not apply.
_NOT_APPLIED = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "min_length",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
)


@dataclass(frozen=True)
class Choice:
    """How a token is chosen from logits.

    Args:
        do_sample: draw from the distribution; else the most likely token.
        temperature: divides the logits, > 0.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens that make up this share, in (0, 1].
        eos: tokens that end a sequence. pad: what a sequence that has ended is filled with.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos: tuple[int, ...] = ()
    pad: int = 0

    def __post_init__(self) -> None:
        def require(name: str, ok: bool, wanted: str) -> None:
            if not ok:
                raise ValueError(f"uncomp.generate: {name} must be {wanted}; got {getattr(self, name)!r}")

        def number(value: Any, kind: type | tuple[type, ...]) -> bool:
            return isinstance(value, kind) and not isinstance(value, bool)

        require("do_sample", isinstance(self.do_sample, bool), "True or False")
        warm = number(self.temperature, (int, float)) and COLDEST <= self.temperature < float("inf")
        require("temperature", warm, f"a number of at least {COLDEST} (do_sample=False for the most likely token)")
        require("top_k", number(self.top_k, int) and self.top_k >= 0, "an integer of at least 0 (0: all tokens)")
        require("top_p", number(self.top_p, (int, float)) and 0 < self.top_p <= 1, "a number in (0, 1]")

    def __call__(self, logits: Tensor) -> Tensor:
        """[B, 1] int64 from [B, V] of any float type. Reads nothing back, so that it can be recorded."""
        if not self.do_sample:
            return logits.argmax(-1, keepdim=True)
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        share = logits.softmax(-1)
        if self.top_p < 1:
            ordered, index = share.sort(descending=True)
            before = ordered.cumsum(-1) - ordered  # the first token always stays
            share = share.masked_fill((before >= self.top_p).gather(-1, index.argsort(-1)), 0.0)
        # The largest of share / exponential noise: a draw without torch.multinomial, which reads its input back.
        return (share / torch.empty_like(share).exponential_()).argmax(-1, keepdim=True)


def choice_for(model: torch.nn.Module, *, eos_token_id: Any, pad_token_id: Any, **options: Any) -> Choice:
    """A Choice whose end and padding tokens default to the model's, the padding then to the first end token, then 0.

    Warns:
        UserWarning: the model's generation_config asks for something that is not applied here.
    """
    defaults = model.generation_config
    for name in _NOT_APPLIED:
        value = getattr(defaults, name, None)
        if value is not None and value != 0 and value != 1.0:
            warnings.warn(
                f"uncomp.generate: {name}={value!r} of the model's generation_config is not applied; "
                "the model's own generate applies it",
                stacklevel=4,
            )
    eos = defaults.eos_token_id if eos_token_id is None else eos_token_id
    if isinstance(eos, Tensor):
        eos = eos.flatten().tolist()
    several = isinstance(eos, (list, tuple))
    eos = () if eos is None else tuple(_token("eos_token_id", t) for t in (eos if several else (eos,)))
    pad = defaults.pad_token_id if pad_token_id is None else pad_token_id
    pad = (eos[0] if eos else 0) if pad is None else _token("pad_token_id", pad)
    return Choice(eos=eos, pad=pad, **options)


def _token(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"uncomp.generate: {name} must be a token id; got {value!r}") from None
