# SPDX-License-Identifier: Apache-2.0
"""All metrics by name."""

from __future__ import annotations

from uncomp.eval.metrics import RULES, Case, first_line
from uncomp.eval.metrics_infinitebench import INFINITEBENCH

METRICS = {**RULES, **INFINITEBENCH}


def score(metric: str, prediction: str, case: Case, *, one_line: bool = False) -> float:
    """A prediction's score, 0 to 1.

    Args:
        metric: a name of `METRICS`.
        prediction: new text of the model.
        case: what it is scored against; needs an answer.
        one_line: score the first line alone.
    Raises:
        ValueError: an unknown metric, or a case without answers.
    """
    rule = METRICS.get(metric)
    if rule is None:
        raise ValueError(f"uncomp.eval: metric must be one of {', '.join(METRICS)}; got {metric!r}")
    if not case.answers:
        raise ValueError(f"uncomp.eval: answers must hold at least one reference for {metric}; got none")
    if not prediction and metric != "rouge1_stem":
        return 0.0
    return rule(first_line(prediction) if one_line else prediction, case)
