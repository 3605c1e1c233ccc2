# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench's own ways to find an answer in a prediction; each gives 0 to 1. docs/evaluation.md "Metrics"."""

from __future__ import annotations

import random
import re
import string
import unicodedata
from collections.abc import Callable

from uncomp.eval.metrics import Case, overlap_f, qa_f1

_BLANKS = re.compile(r"[:\"'.,?!{}\n]")
_LEADS = ("answer is:", "is:", "answer:", "correct option is:")


def _words(text: str) -> list[str]:
    return _BLANKS.sub(" ", text).split()


def among_words(prediction: str, case: Case) -> float:
    """1 if an answer is one of the words."""
    found = set(_words(prediction))
    return float(any(answer.strip() in found for answer in case.answers))


def among_capitals(prediction: str, case: Case) -> float:
    """1 if an answer is one of the words in upper case."""
    found = {word.upper() for word in _words(prediction)}
    return float(any(answer.strip().upper() in found for answer in case.answers))


def characters(prediction: str, case: Case) -> float:
    """F over characters without blanks and punctuation."""

    def kept(text: str) -> list[str]:
        return [c for c in text.lower() if not c.isspace() and not unicodedata.category(c).startswith("P")]

    return max(overlap_f(kept(prediction), kept(answer)) for answer in case.answers)


def words_f1(prediction: str, case: Case) -> float:
    """As in LongBench."""
    return max(qa_f1(prediction, answer) for answer in case.answers)


def _sentences(text: str) -> list[list[str]]:
    return [re.findall(r"[a-z0-9]+", line.lower()) for line in text.split("\n") if line.strip()]


def _union_hits(reference: list[str], candidates: list[list[str]]) -> int:
    """Words of a reference line on a longest common subsequence with any line of the prediction."""
    marked: set[int] = set()
    for line in candidates:
        table = [[0] * (len(line) + 1)]
        for word in reference:
            above, row = table[-1], [0]
            for j, other in enumerate(line, 1):
                row.append(above[j - 1] + 1 if word == other else max(above[j], row[-1]))
            table.append(row)
        i, j = len(reference), len(line)
        while i and j:
            if reference[i - 1] == line[j - 1]:
                marked.add(i - 1)
                i, j = i - 1, j - 1
            elif table[i - 1][j] >= table[i][j - 1]:
                i -= 1
            else:
                j -= 1
    return len(marked)


def rouge_lsum(prediction: str, case: Case) -> float:
    """F of ROUGE-Lsum: lines are sentences, lower-case runs of letters and digits are words."""
    candidates = _sentences(prediction)
    size = sum(map(len, candidates))
    best = 0.0
    for answer in case.answers:
        references = _sentences(answer)
        wanted = sum(map(len, references))
        if size and wanted:
            hits = min(sum(_union_hits(line, candidates) for line in references), size)
            best = max(best, 2 * hits / (size + wanted))
    return best


def _letters(case: Case) -> str:
    return string.ascii_uppercase[: len(case.options)] or "ABCD"


def guess(case: Case) -> str:
    """The letter drawn for a prediction that names none."""
    return random.Random(case.seed).choice(_letters(case))


def named_choice(prediction: str, case: Case) -> str | None:
    """The letter that a prediction names: its last single one, else what follows "answer is:" and the like."""
    letters = _letters(case)
    alone = re.findall(rf"(?<![A-Za-z0-9])([{letters}])(?![A-Za-z0-9])", prediction)
    if alone:
        return alone[-1]
    for lead in _LEADS:
        at = prediction.lower().find(lead)
        if at < 0:
            continue
        rest = prediction[at + len(lead) :].strip()
        for letter, option in zip(letters, case.options, strict=False):
            if rest.startswith(letter) or (option and rest.startswith(option)):
                return letter
    return None


def choice(prediction: str, case: Case) -> float:
    """1 if the named letter, else the guessed one, is that of an answer; an answer may be a letter or an option."""
    found = named_choice(prediction, case) or guess(case)
    option = dict(zip(_letters(case), case.options, strict=False)).get(found)
    return float(any(answer.strip() in (found, option) for answer in case.answers))


def last_integer(prediction: str, case: Case) -> float:
    """1 if the last word is the integer."""
    words = _BLANKS.sub(" ", prediction).split()
    return float(bool(words) and any(words[-1] == answer.strip() for answer in case.answers))


def first_value(prediction: str, case: Case) -> float:
    """1 if the first number equals the answer, both as numbers."""
    found = re.search(r"-?\d+(?:\.\d+)?", prediction)
    if found is None:
        return 0.0
    return float(any(_number(answer) == float(found[0]) for answer in case.answers))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def before_first_error(prediction: str, case: Case) -> float:
    """Share of the list of numbers that is right before the first wrong one; the answers are that list."""
    found = re.findall(r"-?\d+", prediction)
    right = 0
    for got, wanted in zip(found, case.answers, strict=False):
        if got != wanted.strip():
            break
        right += 1
    return right / len(case.answers)


INFINITEBENCH: dict[str, Callable[[str, Case], float]] = {
    "among_words": among_words,
    "among_capitals": among_capitals,
    "characters": characters,
    "words_f1": words_f1,
    "rouge_lsum": rouge_lsum,
    "choice": choice,
    "last_integer": last_integer,
    "first_value": first_value,
    "before_first_error": before_first_error,
}
