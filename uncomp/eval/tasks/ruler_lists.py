# SPDX-License-Identifier: Apache-2.0
"""RULER-style tasks without a haystack of essays: chains of variables, common words, frequent words."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

HOPS = 4
COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
ALPHA, ASKED = 2.0, 3
_IDLE = "The lamp is lit. Rain falls on the roof. A dog sleeps by the door. The night goes on.\n"
_IDLE_TOKENS = 22  # about; sizes are tried, so it need not be right


@dataclass(frozen=True)
class Made:
    """A generated text: what is read, what is asked, how the answer begins, what it must contain, where it stands."""

    context: str
    question: str
    prefix: str
    answers: list[str]
    evidence: list[str] = field(default_factory=list)


def random_uuid(draw: random.Random) -> str:
    """A random UUID from this generator."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def draw_words(draw: random.Random, pool: Sequence[str], count: int) -> list[str]:
    """Different words.

    Raises:
        ValueError: the essays have too few.
    """
    if len(pool) < count:
        raise ValueError(
            f"uncomp eval: the essays must have {count} different words of 4 to 9 letters; got {len(pool)}"
        )
    return draw.sample(pool, count)


def variables(draw: random.Random, size: int, pool: Sequence[str]) -> Made:
    """One chain: a number, and variables each of which is the one before; all of them are asked for."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(draw.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
        if name not in names:
            names.append(name)
    value = draw.randint(10000, 99999)
    said = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in pairwise(names)]
    lines = [_IDLE] * max(1, size // _IDLE_TOKENS)
    places = sorted(draw.choices(range(len(lines) + 1), k=len(said)))
    for at, line in reversed(list(zip(places, said, strict=True))):
        lines.insert(at, line + "\n")
    intro = "Memorize and track the chain of variable assignments hidden in the following text.\n"
    return Made(
        context=intro + "".join(lines).rstrip("\n"),
        question=f"Question: Find all variables that are assigned the value {value} in the text above.",
        prefix=f" Answer: Following the chain of assignments above, {len(names)} variables have the value {value}: ",
        answers=names,
        evidence=said,
    )


def common_words(draw: random.Random, size: int, pool: Sequence[str]) -> Made:
    """A numbered list in which ten words stand ten times as often as the others; those ten are asked for."""
    entries = max(COMMON * (OTHER_TIMES + 1), size // 5)
    times = min(COMMON_TIMES, max(4, entries // (2 * COMMON)))
    other_times = min(OTHER_TIMES, max(1, times // 4))
    others = max(1, (entries - COMMON * times) // other_times)
    words = draw_words(draw, pool, min(max(len(pool), COMMON), COMMON + others))
    common, rest = words[:COMMON], words[COMMON:]
    listed = common * times + rest * other_times
    draw.shuffle(listed)
    intro = "Below is a numbered list of words. Some of them stand there more often than others. Memorize those.\n"
    return Made(
        context=intro + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)),
        question=f"Question: What are the {COMMON} most common words in the above list?",
        prefix=f" Answer: The top {COMMON} words that appear most often in the list are:",
        answers=common,
    )


def frequent_words(draw: random.Random, size: int, pool: Sequence[str]) -> Made:
    """Made-up words whose frequencies fall as a power of their rank; the three most frequent are asked for."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = list(dict.fromkeys("".join(draw.choices(letters, k=6)) for _ in range(400)))
    draws = max(40, size // 5)
    share = sum(rank**-ALPHA for rank in range(1, len(words) + 1))
    listed = [word for rank, word in enumerate(words, 1) for _ in range(max(1, round(draws * rank**-ALPHA / share)))][
        :draws
    ]
    draw.shuffle(listed)
    intro = "Read the following coded text and track the frequency of each coded word.\n"
    return Made(
        context=intro + " ".join(listed),
        question=f"Question: What are the {ASKED} most frequently appeared words in the above coded text?",
        prefix=f" Answer: According to the coded text above, the {ASKED} most frequently appeared words are:",
        answers=words[:ASKED],
    )
