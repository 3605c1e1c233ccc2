# SPDX-License-Identifier: Apache-2.0
"""The texts of a calibration run: one long row of tokens, and where in it the samples begin."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Equally long pieces of a text.

    Fields:
        tokens: [N_t] int64, the whole text.
        starts: first token of every sample.
        length: tokens of a sample that come from the text.
        bos: the token in front of them, or None.
        sha256: of the text, hex.
    """

    tokens: Tensor
    starts: list[int]
    length: int
    bos: int | None
    sha256: str

    @property
    def seqlen(self) -> int:
        """Tokens of a sample."""
        return self.length + (self.bos is not None)

    def batches(self, size: int, done: int = 0) -> Iterator[Tensor]:
        """[up to size, seqlen] int64 each, from sample `done` on."""
        for begin in range(done, len(self.starts), size):
            rows = [self.tokens[s : s + self.length] for s in self.starts[begin : begin + size]]
            batch = torch.stack(rows)
            if self.bos is not None:
                batch = torch.cat([torch.full((len(rows), 1), self.bos), batch], 1)
            yield batch


def draw(tokenizer: Any, texts: str | Sequence[str] | Tensor, samples: int, seqlen: int, seed: int) -> Samples:
    """Tokenises the texts, joined by two newlines, and draws the starts.

    Sample s starts at random.Random(seed).randrange(N_t - m + 1), drawn in order; m = seqlen, or one less with a BOS
    token in front where the tokenizer adds one.

    Args:
        tokenizer: of the model; None for texts that are tokens, which then get no BOS.
        texts: one or more, or the tokens themselves, [N_t] int64. samples, seqlen, seed: as calibrate.
    Raises:
        TypeError: texts that are neither strings nor a tensor of int64.
        ValueError: no text, or fewer than m tokens; states how many there are.
    Source: docs/method.md "Calibration and profiles".
    """
    tokens, digest = _given(texts) if isinstance(texts, Tensor) else _tokenised(tokenizer, texts)
    bos = None if tokenizer is None else _bos(tokenizer)
    length = seqlen - (bos is not None)
    if len(tokens) < length:
        raise ValueError(
            f"uncomp.calibrate: texts must have at least {length} tokens for seqlen = {seqlen}; got {len(tokens)}"
        )
    rng = random.Random(seed)
    starts = [rng.randrange(len(tokens) - length + 1) for _ in range(samples)]
    return Samples(tokens, starts, length, bos, digest)


def _given(tokens: Tensor) -> tuple[Tensor, str]:
    """Tokens that the caller has, and the sha256 of their bytes."""
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        got = f"{list(tokens.shape)} {str(tokens.dtype).removeprefix('torch.')}"
        raise TypeError(f"uncomp.calibrate: texts must be strings, or tokens [N] int64; got a tensor {got}")
    tokens = tokens.detach().cpu()
    return tokens, hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _tokenised(tokenizer: Any, texts: str | Sequence[str]) -> tuple[Tensor, str]:
    """The tokens of texts joined by two newlines, and the sha256 of that text."""
    if not isinstance(texts, (str, Sequence)):
        raise TypeError(f"uncomp.calibrate: texts must be strings, or tokens [N] int64; got {type(texts).__name__}")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"uncomp.calibrate: texts must be strings; got {type(text).__name__}")
    whole = "\n\n".join(texts)
    if not whole.strip():
        raise ValueError("uncomp.calibrate: texts must hold some text; got none")
    if tokenizer is None:
        raise ValueError("uncomp.calibrate: tokenizer must be the model's for texts that are strings; got None")
    try:
        digest = hashlib.sha256(whole.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise ValueError(f"uncomp.calibrate: texts must be Unicode text; character {error.start} is none") from error
    ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64), digest


def _bos(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts in front of a text by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    plain, special = (list(tokenizer("a", add_special_tokens=s)["input_ids"]) for s in (False, True))
    return bos if bos is not None and special[:1] == [bos] and plain[:1] != [bos] else None
