# SPDX-License-Identifier: Apache-2.0
"""The texts of a calibration run: one long row of tokens, and where in it the samples begin."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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


def read_texts(paths: Sequence[str]) -> list[str]:
    """The texts of UTF-8 files.

    Raises:
        ValueError: a file that cannot be read, is not UTF-8 or is empty; names it.
    """
    texts = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f'uncomp.calibrate: text "{path}" cannot be read ({error.strerror})') from error
        except UnicodeDecodeError as error:
            raise ValueError(f'uncomp.calibrate: text "{path}" is not UTF-8 (byte {error.start})') from error
        if not text.strip():
            raise ValueError(f'uncomp.calibrate: text "{path}" is empty')
        texts.append(text)
    return texts


def draw(tokenizer: Any, texts: str | Sequence[str], samples: int, seqlen: int, seed: int) -> Samples:
    """Tokenises the texts, joined by two newlines, and draws the starts.

    Sample s starts at random.Random(seed).randrange(N_t - m + 1), drawn in order; m = seqlen, or one less with a BOS
    token in front where the tokenizer adds one.

    Args:
        tokenizer: of the model. texts: one or more. samples, seqlen, seed: as calibrate.
    Raises:
        TypeError: texts that are no strings.
        ValueError: no text, or fewer than m tokens; states how many there are.
    Source: docs/method.md "Calibration and profiles".
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"uncomp.calibrate: texts must be strings; got {type(text).__name__}")
    whole = "\n\n".join(texts)
    if not whole.strip():
        raise ValueError("uncomp.calibrate: texts must hold some text; got none")
    try:
        digest = hashlib.sha256(whole.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise ValueError(f"uncomp.calibrate: texts must be Unicode text; character {error.start} is none") from error
    ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    tokens, bos = torch.tensor(ids, dtype=torch.int64), _bos(tokenizer)
    length = seqlen - (bos is not None)
    if len(tokens) < length:
        raise ValueError(
            f"uncomp.calibrate: texts must have at least {length} tokens for seqlen = {seqlen}; got {len(tokens)}"
        )
    rng = random.Random(seed)
    starts = [rng.randrange(len(tokens) - length + 1) for _ in range(samples)]
    return Samples(tokens, starts, length, bos, digest)


def _bos(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts in front of a text by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    plain, special = (list(tokenizer("a", add_special_tokens=s)["input_ids"]) for s in (False, True))
    return bos if bos is not None and special[:1] == [bos] and plain[:1] != [bos] else None
