# SPDX-License-Identifier: Apache-2.0
"""Scores equal the published scorers': by hand on small cases, and on their own records where those are at hand."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from support import shared_data

from uncomp.eval import metrics, metrics_infinitebench
from uncomp.eval.metrics import Case
from uncomp.eval.scores import score
from uncomp.eval.tasks.longbench import METRIC, ONE_LINE

LABELS = ("Number of something", "Number", "Date", "Other number")

# metric, prediction, answers, score worked out by hand
BY_HAND = [
    ("qa_f1", "The cat, sat!", ["a cat sat"], 1.0),
    ("qa_f1", "cat cat dog", ["cat"], 0.5),  # P 1/3, R 1
    ("qa_f1", "it's", ["its"], 1.0),  # punctuation leaves no space
    ("qa_f1", "dog", ["cat", "dog house"], 2 / 3),  # the best of the references
    ("qa_f1", "the", ["a"], 0.0),
    ("qa_f1", "", ["anything"], 0.0),
    ("rouge_l", "x b c", ["a b c"], 2 / 3),
    ("rouge_l", "b a", ["a b"], 0.5),  # one of two equally long ways is walked
    ("rouge_l", "a b. c", ["c. a b"], 1.0),  # fragments meet in any order
    ("rouge_l", "A", ["a"], 0.0),  # case counts
    ("rouge_l", "...", ["a"], 0.0),  # no fragments
    ("rouge_l", "a a a b", ["a b"], 1.0),  # distinct words
    ("rouge_l", "a. ", ["a"], 2 / 3),  # a fragment of blanks is one empty word: P 1/2
    ("count", "3 or 4 or 3", ["3"], 2 / 3),
    ("count", "none", ["3"], 0.0),
    ("retrieval", "Paragraph 12, or 1", ["Paragraph 12"], 0.5),
    ("retrieval", "12", ["no number"], 0.0),
    ("edit_sim", "\n\n# why\nabcd\nrest", ["abce"], 0.75),  # the first line without a comment mark
    ("edit_sim", "abc", ["abd"], 0.67),  # a substitution counts twice, in whole hundredths
    ("edit_sim", "```", ["x"], 0.0),
    ("gsm8k", "so 3. Answer: 1,234.", ["1234"], 1.0),
    ("gsm8k", "18.0 dollars", ["18"], 1.0),
    ("gsm8k", "#### 7 apples", ["7"], 1.0),
    ("gsm8k", "it is 5 then 6", ["5"], 0.0),
    ("gsm8k", "no idea", ["5"], 0.0),
    ("hit", "You EAT a sandwich.", ["eat the sandwich"], 1.0),
    ("hit", "", ["eat"], 0.0),
    ("rouge1", "a b", ["a c"], 0.5),
    ("contained", "My Answer is YES", ["yes"], 1.0),
    ("contained_share", "one two", ["one", "three"], 0.5),
    ("first_number", "it is 42, not 7", ["42"], 1.0),
    ("first_number", "7 42", ["42"], 0.0),
    ("among_words", "it's {ab-c}, yes", ["ab-c"], 1.0),
    ("among_words", "ab-cd", ["ab-c"], 0.0),
    ("among_capitals", "I say John.", ["JOHN"], 1.0),
    ("characters", "\u6211\u4eec\u3002", ["\u6211"], 2 / 3),
    ("words_f1", "a cat", ["the cat"], 1.0),
    ("rouge_lsum", "a b\nc", ["a c"], 0.8),  # both words of the reference are met, by two lines
    ("rouge_lsum", "x", ["a"], 0.0),
    ("last_integer", "it is -4.", ["-4"], 1.0),
    ("last_integer", "-4 it is", ["-4"], 0.0),
    ("first_value", "about 2.50, not 3", ["2.5"], 1.0),
    ("first_value", "none", ["2.5"], 0.0),
    ("before_first_error", "[1, 2, 4]", ["1", "2", "3", "4"], 0.5),
]


@pytest.mark.parametrize(("metric", "prediction", "answers", "wanted"), BY_HAND)
def test_by_hand(metric, prediction, answers, wanted):
    assert score(metric, prediction, Case(answers)) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "gold", "wanted"),
    [
        ("Date", "Date", 1.0),
        ("Number of something", "Number of something", 1.0),  # a part of the gold label is no rival
        ("Number of something", "Number", 0.5),
        ("Date or Number", "Date", 0.5),
        ("Colour", "Date", 0.0),
    ],
)
def test_label(prediction, gold, wanted):
    assert score("class", prediction, Case([gold], classes=LABELS)) == wanted


@pytest.mark.parametrize(
    ("prediction", "wanted"),
    [
        ("A or rather B", 1.0),
        ("Banana", None),  # a guess: no letter stands alone
        ("the answer is: two, I think", 1.0),
        ("the answer is: one", 0.0),
        ("E", None),  # no such option
    ],
)
def test_choice(prediction, wanted):
    case = Case(["B"], options=("one", "two", "three"), seed="42:7")
    guessed = metrics_infinitebench.guess(case)
    assert guessed in "ABC" and guessed == metrics_infinitebench.guess(case)
    assert (metrics_infinitebench.named_choice(prediction, case) is None) == (wanted is None)
    assert score("choice", prediction, case) == (float(guessed == "B") if wanted is None else wanted)


def test_a_next_problem_counts_where_none_stood_before():
    """After worked examples a model may go on with another one; without, it may repeat the problem."""
    text = "Problem: 2 and 5? Answer: 7"
    assert score("gsm8k", text, Case(["7"])) == 1.0 and score("gsm8k", text, Case(["7"], until="Problem:")) == 0.0
    text = "Answer: 7\n\nProblem: 9 and 9? Answer: 18"
    assert score("gsm8k", text, Case(["7"])) == 0.0 and score("gsm8k", text, Case(["7"], until="Problem:")) == 1.0


def test_stem_of_the_needle():
    """With it an empty prediction scores; with the whole answer the score is 1."""
    case = Case(["eat a pie"], stem="One should ", needle="One should eat a pie.")
    assert score("rouge1_stem", "eat a pie", case) == 1.0
    assert score("rouge1_stem", "", case) == pytest.approx(2 * 2 / 7)


def test_only_the_first_line_counts_where_it_should():
    assert score("qa_f1", "\n\ncat\ndog", Case(["cat"]), one_line=True) == 1.0
    assert score("qa_f1", "\n\ncat\ndog", Case(["cat"])) < 1.0


def test_number_after():
    assert metrics.number_after("1 #### -2,000.50 3") == Decimal("-2000.50")
    assert metrics.number_after("Answer: none, but 4 before") == Decimal(4)
    assert metrics.number_after("Answer: none") is None


@pytest.mark.parametrize(("one", "other", "wanted"), [("abcbdab", "bdcaba", 4), ("", "a", 0), ("aaa", "aa", 2)])
def test_common_subsequence(one, other, wanted):
    assert metrics.lcs_length(one, other) == metrics.lcs_length(other, one) == wanted


def test_refused():
    with pytest.raises(ValueError, match=r"^uncomp.eval: metric must be one of qa_f1, "):
        score("bleu", "a", Case(["a"]))
    with pytest.raises(ValueError, match=r"^uncomp.eval: answers must hold at least one reference for qa_f1"):
        score("qa_f1", "a", Case([]))


def oracle() -> Path:
    return shared_data("longbench_metric_oracle")


@pytest.mark.parametrize("setting", ["fullkv", "snapkv_c1024_w32_k7"])
@pytest.mark.parametrize("task", METRIC)
def test_published_scores_of_single_records(task, setting):
    """To the published two decimals."""
    lines = (oracle() / setting / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        record = json.loads(line)
        case = Case(record["answers"], classes=record["all_classes"] or ())
        got = score(METRIC[task], record["pred"], case, one_line=task in ONE_LINE)
        assert got == pytest.approx(record["score"], abs=0.005 + 1e-9), record["idx"]
