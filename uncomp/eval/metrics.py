# SPDX-License-Identifier: Apache-2.0
"""Scores of a prediction against references, each from 0 to 1. docs/evaluation.md "Metrics" defines every rule.

They follow the published scorers down to their ties and roundings, because a score that is a little different cannot be
set beside a published one. An empty prediction scores 0, except in `rouge1_stem`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Case:
    """What a prediction is scored against.

    Fields:
        answers: one or more references.
        classes: all labels, for `class`.
        stem: what stands before the answer in the needle, for `rouge1_stem`.
        needle: the whole needle, for `rouge1_stem`.
        seed: text that seeds a guess where a rule guesses.
        options: the choices, for `choice` metrics.
        until: what begins the next problem, for `gsm8k` after worked examples.
    """

    answers: Sequence[str]
    classes: Sequence[str] = ()
    stem: str = ""
    needle: str = ""
    seed: str = ""
    options: Sequence[str] = ()
    until: str = ""


# ---- pieces
def first_line(text: str) -> str:
    """The text before the first newline that follows its leading newlines."""
    return text.lstrip("\n").split("\n", 1)[0]


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def overlap_f(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F of two multisets: harmonic mean of the shares that both have in common."""
    common = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * common / (len(prediction) + len(reference)) if common else 0.0


def lcs_length(one: Sequence, other: Sequence) -> int:
    """Length of the longest common subsequence, by bits: a row of the table is one integer."""
    places: dict = {}
    for i, item in enumerate(one):
        places[item] = places.get(item, 0) | 1 << i
    full = (1 << len(one)) - 1
    row = full
    for item in other:
        hit = row & places.get(item, 0)
        row = (row + hit | row - hit) & full
    return len(one) - row.bit_count()


# ---- one reference
def qa_f1(prediction: str, answer: str) -> float:
    """F over normalised words."""
    return overlap_f(normalise(prediction).split(), normalise(answer).split())


def _fragments(text: str) -> list[list[str]]:
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _taken(reference: list[str], prediction: list[str]) -> set[str]:
    """Words on the one path through the table of common subsequences that the published scorer walks."""
    width = len(prediction) + 1
    table = [[0] * width]
    for word in reference:
        above, row, left = table[-1], [0] * width, 0
        for j, other in enumerate(prediction, 1):
            left = above[j - 1] + 1 if word == other else above[j] if above[j] > left else left
            row[j] = left
        table.append(row)
    i, j, taken = len(reference), len(prediction), set()
    while i and j:
        if reference[i - 1] == prediction[j - 1]:
            taken.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return taken


def rouge_l(prediction: str, answer: str) -> float:
    """F of the words taken by the common subsequences of all pairs of fragments, over distinct words."""
    references, predictions = _fragments(answer), _fragments(prediction)
    if not references or not predictions:
        return 0.0
    taken: set[str] = set()
    sets = [set(p) for p in predictions]
    for reference in references:
        words = set(reference)
        for piece, known in zip(predictions, sets, strict=True):
            if words & known:  # else the path meets no equal words
                taken |= _taken(reference, piece)
    p = len(taken) / len({word for piece in predictions for word in piece})
    r = len(taken) / len({word for piece in references for word in piece})
    return 2 * p * r / (p + r + 1e-8)


def edit_sim(prediction: str, answer: str) -> float:
    """Similarity of the first line that is code, by insertions and deletions of characters, in whole hundredths."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if "`" not in x and "#" not in x and "//" not in x), "")
    both = len(line) + len(answer)
    return round(100 * 2 * lcs_length(line, answer) / both) / 100 if both else 1.0


def _share_of_runs(prediction: str, wanted: str) -> float:
    runs = _DIGITS.findall(prediction)
    return sum(run == wanted for run in runs) / len(runs) if runs else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the digit runs that are the gold number."""
    return _share_of_runs(prediction, answer)


def retrieval(prediction: str, answer: str) -> float:
    """Share of the digit runs that are the number of the gold paragraph."""
    found = re.search(r"Paragraph (\d+)", answer)
    return _share_of_runs(prediction, found[1]) if found else 0.0


def number_after(text: str) -> Decimal | None:
    """The number after the last "Answer:" or "####", else the last number of the text, else None."""
    tail = re.split(r"Answer:|####", text)
    found = _NUMBER.findall(tail[-1])[:1] if len(tail) > 1 else []
    found = found or _NUMBER.findall(text)[-1:]
    return Decimal(found[0].replace(",", "")) if found else None


def gsm8k(prediction: str, answer: str) -> float:
    """1 if both end in the same number."""
    got = number_after(prediction)
    return float(got is not None and got == number_after(answer))


def hit(prediction: str, answer: str) -> float:
    """1 if the normalised answer is part of the normalised prediction."""
    return float(normalise(answer) in normalise(prediction))


def rouge1(prediction: str, answer: str) -> float:
    """F over lower-case runs of letters and digits."""
    words = re.compile(r"[a-z0-9]+")
    return overlap_f(words.findall(prediction.lower()), words.findall(answer.lower()))


def contained(prediction: str, answer: str) -> float:
    """1 if the answer is part of the prediction, ignoring case."""
    return float(answer.lower() in prediction.lower())


def first_number(prediction: str, answer: str) -> float:
    """1 if the first digit run is the answer."""
    found = _DIGITS.search(prediction)
    return float(found is not None and found[0] == answer.strip())


# ---- all references
def _best(rule: Callable[[str, str], float]) -> Callable[[str, Case], float]:
    def score(prediction: str, case: Case) -> float:
        return max(rule(prediction, answer) for answer in case.answers) if prediction else 0.0

    return score


def _label(prediction: str, case: Case) -> float:
    best = 0.0
    for gold in case.answers:
        found = [name for name in case.classes if name in prediction]
        found = [name for name in found if name == gold or name not in gold]
        best = max(best, 1 / len(found) if gold in found else 0.0)
    return best


def _share_contained(prediction: str, case: Case) -> float:
    return sum(contained(prediction, answer) for answer in case.answers) / len(case.answers) if prediction else 0.0


def _one_problem(prediction: str, case: Case) -> float:
    """What a model writes about a next problem is left out."""
    return _best(gsm8k)(prediction.split(case.until, 1)[0] if case.until else prediction, case)


def _with_stem(prediction: str, case: Case) -> float:
    return rouge1(case.stem + prediction, case.needle)


RULES: dict[str, Callable[[str, Case], float]] = {
    "qa_f1": _best(qa_f1),
    "rouge_l": _best(rouge_l),
    "class": _label,
    "retrieval": _best(retrieval),
    "count": _best(count),
    "edit_sim": _best(edit_sim),
    "gsm8k": _one_problem,
    "hit": _best(hit),
    "rouge1": _best(rouge1),
    "rouge1_stem": _with_stem,
    "contained": _best(contained),
    "contained_share": _share_contained,
    "first_number": _best(first_number),
}
