# SPDX-License-Identifier: Apache-2.0
"""What a profile says, as numbers: the plan of its groups, how sure their order is, how alike two profiles are.

Pure functions of a HeadProfile; `uncomp show` prints them and uncomp/figures draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import fsum, sqrt
from typing import Any

import torch

from uncomp import budget as budgets
from uncomp import grouping, presets, stages
from uncomp.calibration.profile import HeadProfile
from uncomp.entropy import elbow

SCOPES = ("layer", "model")
_LONG = 1 << 20  # tokens of a prompt that no limit reaches, so that the plan is the budget's alone


@dataclass(frozen=True)
class HeadPlan:
    """Groups and tokens of every row.

    Fields:
        groups: [L][H] group ids, 0 = lowest entropy.
        limits: [L][H] tokens that a row may store, for a prompt longer than all of them.
        num_groups: G.
        rows: "kv_head" or "query_head". scope: "layer" or "model".
    """

    groups: list[list[int]]
    limits: list[list[int]]
    num_groups: int
    rows: str
    scope: str

    def tokens(self) -> list[tuple[int, int]]:
        """Fewest and most tokens of the rows of each group; rows of one group differ by rounding alone."""
        found: list[list[int]] = [[] for _ in range(self.num_groups)]
        for ids, limits in zip(self.groups, self.limits, strict=True):
            for group, limit in zip(ids, limits, strict=True):
                found[group].append(limit)
        return [(min(tokens), max(tokens)) for tokens in found]


def head_plan(
    profile: HeadProfile,
    num_groups: int | None = None,
    *,
    rows: str = "kv_head",
    scope: str | None = None,
    budget: int = 384,
    shape: str = "linear",
    floor: int = 8,
) -> HeadPlan:
    """Groups of a profile and what each row may store.

    Args:
        profile: the HeadProfile.
        num_groups: G; default that of a preset, else 8, or all rows of the model where they are fewer.
        rows: "kv_head" or "query_head".
        scope: "layer" cuts the rows of each layer, "model" all rows at once; default: "layer" where a layer has G rows.
        budget: mean tokens of a row.
        shape: "linear" or the name of a preset, whose values are the weights.
        floor: window and sinks, tokens.
    Returns:
        a HeadPlan.
    Raises:
        ValueError: more groups than rows, an unknown rows, scope or shape, a budget below the floor.
    Source: docs/method.md "Grouping", "Budget".
    """
    facts = profile.model
    if rows not in ("kv_head", "query_head"):
        raise ValueError(f"uncomp.calibration: rows must be kv_head or query_head; got {rows!r}")
    if scope not in (None, *SCOPES):
        raise ValueError(f"uncomp.calibration: scope must be one of {', '.join(SCOPES)}; got {scope!r}")
    count = facts.Hkv if rows == "kv_head" else facts.Hq
    named = None if shape == "linear" else presets.preset(shape)
    if num_groups is None:
        num_groups = len(named.values) if named else min(8, facts.L * count)
    elif named is not None and num_groups != len(named.values):
        raise ValueError(
            f"uncomp.calibration: groups must be {len(named.values)}, as shape {shape} has; got {num_groups}"
        )
    scope = scope or ("layer" if num_groups <= count else "model")
    most = count if scope == "layer" else facts.L * count
    if not 1 <= num_groups <= most:
        raise ValueError(f"uncomp.calibration: groups must lie in [1, {most}], the rows of a {scope}; got {num_groups}")
    budgets.mean_tokens(budget, _LONG, floor)
    if scope == "model":
        ids = profile.model_groups(num_groups, rows)
        flat = [group for layer in ids for group in layer]
        weights = named.weights(0, facts.L, _LONG) if named else budgets.group_weights(num_groups)
        tokens = _limits([flat], weights, budget, floor)[0]
        limits = [tokens[layer * count : (layer + 1) * count] for layer in range(facts.L)]
        return HeadPlan(ids, limits, num_groups, rows, scope)
    ids, limits = [], []
    for layer in range(facts.L):
        size = len(named.at_layer(layer, facts.L)) if named else num_groups
        ids.append(profile.groups(layer, size, rows))
        weights = named.weights(layer, facts.L, _LONG) if named else budgets.group_weights(size)
        limits += _limits([ids[-1]], weights, budget, floor)
    return HeadPlan(ids, limits, num_groups, rows, scope)


def _limits(ids: list[list[int]], weights: list[int], budget: int, floor: int) -> list[list[int]]:
    total = len(ids[0]) * budget
    return budgets.limits(torch.tensor(ids, dtype=torch.int32), weights, _LONG, total, floor).tolist()


def certainty(profile: HeadProfile, num_groups: int, rows: str = "kv_head") -> float:
    """Share of samples in which a row fell into the group that the profile gives it, mean over rows and layers.

    1 / G is what rows without any order would have; 1 means that every text ordered the heads alike.

    Args:
        profile: the HeadProfile.
        num_groups: G, 1 to the rows of a layer.
        rows: "kv_head" or "query_head".
    Raises:
        ValueError: G or rows outside these.
    """
    agreed, cells = 0, 0
    for layer, votes in enumerate(profile.rank_votes[rows]):
        edges = [0, *accumulate(grouping.group_sizes(len(votes), num_groups))]
        for row, group in enumerate(profile.groups(layer, num_groups, rows)):
            agreed += sum(votes[row][edges[group] : edges[group + 1]])
            cells += 1
    return agreed / (cells * profile.run.samples)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + end - 1) / 2
        start = end
    return ranks


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's correlation of two sequences of equal length: that of their ranks, ties sharing theirs.

    Returns:
        -1 .. 1; 0 where one of them is constant, since it orders nothing.
    Raises:
        ValueError: unequal lengths, or none.
    """
    if len(one) != len(other) or not one:
        raise ValueError(
            f"uncomp.calibration: sequences to correlate must have one length, not 0; got {len(one)}, {len(other)}"
        )
    a, b = _ranks(one), _ranks(other)
    mean = (len(a) - 1) / 2
    top = fsum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    bottom = sqrt(fsum((x - mean) ** 2 for x in a) * fsum((y - mean) ** 2 for y in b))
    return top / bottom if bottom else 0.0


def _at_width(entropy: Sequence[Sequence[float]], width: int) -> list[list[float]]:
    size = len(entropy[0]) // width
    return [[fsum(heads[i * size : (i + 1) * size]) / size for i in range(width)] for heads in entropy]


@dataclass(frozen=True)
class Likeness:
    """How alike two profiles of one model order its heads; Spearman's correlations, -1 .. 1.

    Fields:
        layers: [L] of the heads of each layer.
        layer_mean: their mean.
        model: of all heads of the model at once.
        curve: of the layer curves.
    """

    layers: list[float]
    layer_mean: float
    model: float
    curve: float


def likeness(one: HeadProfile, other: HeadProfile) -> Likeness:
    """Compares two profiles of one model: other texts, prompt lengths or tensors.

    Where one is of keys or values, which have a value per KV head, the mean over the query heads of a KV head counts.

    Raises:
        ValueError: another number of layers, or heads that do not divide each other.
    """
    wide, narrow = len(one.entropy[0]), len(other.entropy[0])
    if len(one.entropy) != len(other.entropy) or max(wide, narrow) % min(wide, narrow):
        ours, theirs = ([len(p.entropy), len(p.entropy[0])] for p in (one, other))
        raise ValueError(
            f"uncomp.calibration: profiles to compare must be of one model; got {one.model.type} of {ours} layers and "
            f"heads and {other.model.type} of {theirs}"
        )
    by_kv_head = {one.run.tensor, other.run.tensor} & {"key", "value"}
    width = min(wide, narrow, one.model.Hkv if by_kv_head else wide)
    a, b = (_at_width(p.entropy, width) for p in (one, other))
    layers = [rank_correlation(x, y) for x, y in zip(a, b, strict=True)]
    return Likeness(
        layers=layers,
        layer_mean=fsum(layers) / len(layers),
        model=rank_correlation([v for heads in a for v in heads], [v for heads in b for v in heads]),
        curve=rank_correlation(one.curve, other.curve),
    )


def profile_stages(profile: HeadProfile, threshold: float | None = None) -> list[int]:
    """First layers of the stages of a profile's layer curve.

    Args:
        profile: the HeadProfile.
        threshold: of the drop that begins a stage; default min(1, Hq / 32).
    Raises:
        ValueError: a threshold that is negative or NaN.
    Source: docs/method.md "Layer stages".
    """
    default = stages.default_threshold(profile.model.Hq)
    return stages.stage_starts(profile.curve, default if threshold is None else threshold)


def summary(profile: HeadProfile, plan: HeadPlan | None = None) -> dict[str, Any]:
    """The profile in a few plain JSON values.

    Args:
        profile: the HeadProfile.
        plan: groups to report beside it.
    Returns:
        model, run, entropy {min, mean, max, lowest_layer, highest_layer}, elbow, curve {first, last, min, max},
        certainty {G: share} for G = 2, 4, 8 as far as a layer has KV heads; stability where the profile has it; with a
        plan groups {count, rows, scope, tokens [G][least, most]}.
    """
    means = [fsum(heads) / len(heads) for heads in profile.entropy]
    flat = [v for heads in profile.entropy for v in heads]
    values = {
        "model": asdict(profile.model),
        "run": asdict(profile.run),
        "entropy": {
            "min": min(flat),
            "mean": fsum(flat) / len(flat),
            "max": max(flat),
            "lowest_layer": means.index(min(means)),
            "highest_layer": means.index(max(means)),
        },
        "elbow": elbow(profile.spectrum),
        "curve": {"first": profile.curve[0], "last": profile.curve[-1]}
        | {"min": min(profile.curve), "max": max(profile.curve)},
        "certainty": {str(count): certainty(profile, count) for count in (2, 4, 8) if count <= profile.model.Hkv},
    }
    stability = getattr(profile, "stability", None)
    if stability is not None:
        values["stability"] = stability
    if plan is not None:
        tokens = [list(pair) for pair in plan.tokens()]
        values["groups"] = {"count": plan.num_groups, "rows": plan.rows, "scope": plan.scope, "tokens": tokens}
    return values
