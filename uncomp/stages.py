# SPDX-License-Identifier: Apache-2.0
"""Takes the mean entropies of a calibration run.

Gives a curve over the layers, the layers at which a stage begins, the tokens of each stage, the retrieval layer.
Formula: a stage begins where the curve falls by more than a threshold; tokens fall evenly from stage to stage.
docs/method.md "Layer stages".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

N_MIN = 1536  # tokens of the last stage, as published


def _refuse(text: str) -> ValueError:
    return ValueError(f"uncomp.stages: {text}")


def _checked(curve: Sequence[float]) -> list[float]:
    for layer, value in enumerate(curve):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise _refuse(f"curve must hold finite numbers; got {value!r} at layer {layer}")
    return list(curve)


# ---- curves
def layer_curve(entropy_full: Sequence[Sequence[float]]) -> list[float]:
    """One number a layer: the sum over its query heads of exp of their whole entropy.

    Args:
        entropy_full: [L][Hq] entropies of all D eigenvalues, shares of ln D: `entropy_full` of a HeadProfile.
    Returns:
        [L]; between Hq and e * Hq.
    Raises:
        ValueError: an entropy that is NaN or Inf.
    Source: docs/method.md "Layer stages".
    """
    return [math.fsum(math.exp(share) for share in _checked(heads)) for heads in entropy_full]


def rank_curve(entropy: Sequence[Sequence[float]], head_dim: int) -> list[float]:
    """One number a layer: the mean effective rank of its query heads, as in the second version of the paper.

    Args:
        entropy: [L][Hq] entropies of k eigenvalues, shares of ln D: `entropy` of a HeadProfile.
        head_dim: D, at least 2.
    Returns:
        [L], means of exp(entropy * ln D).
    Raises:
        ValueError: a layer without heads, D below 2, an entropy outside [0, 1], as variances are.
    Source: docs/method.md "Layer stages".
    """
    if head_dim < 2:
        raise _refuse(f"head_dim must be at least 2; got {head_dim}")
    if not all(map(len, entropy)):
        raise _refuse("entropy must hold at least one head in every layer; got a layer without heads")
    for layer, heads in enumerate(entropy):
        for share in _checked(heads):
            if not -1e-6 <= share <= 1 + 1e-6:  # sums of float32 may pass the ends
                raise _refuse(f"entropy must lie in [0, 1], shares of ln D; got {share!r} at layer {layer}")
    return [math.fsum(head_dim**share for share in heads) / len(heads) for heads in entropy]


# ---- stages of a curve
def default_threshold(num_q_heads: int) -> float:
    """min(1, Hq / 32): the curve is a sum over heads, so models of few heads have small drops.

    Source: docs/method.md "Layer stages".
    """
    if num_q_heads < 1:
        raise _refuse(f"num_q_heads must be at least 1; got {num_q_heads}")
    return min(1.0, num_q_heads / 32)


def _drops(curve: Sequence[float]) -> list[float]:
    return [before - after for before, after in pairwise(_checked(curve))]


def stage_starts(curve: Sequence[float], threshold: float) -> list[int]:
    """First layers of the stages: layer 0, and every layer at which the curve has fallen by more than the threshold.

    Args:
        curve: [L]; an empty one has no stages.
        threshold: of the drop from one layer to the next, at least 0, in units of the curve.
    Returns:
        Ascending layers.
    Raises:
        ValueError: NaN or Inf in the curve; a threshold that is negative or NaN.
    Source: docs/method.md "Layer stages".
    """
    if not threshold >= 0:
        raise _refuse(f"threshold must be at least 0; got {threshold}")
    starts = [layer for layer, drop in enumerate(_drops(curve), 1) if drop > threshold]
    return [0, *starts] if len(curve) else []


def find_threshold(curve: Sequence[float], num_stages: int) -> float:
    """The smallest threshold at which a curve has exactly the wanted number of stages.

    It is the largest drop that must not split, or 0 where every drop splits; nothing is searched by steps.

    Args:
        curve: [L], at least one layer.
        num_stages: wanted, at least 1.
    Raises:
        ValueError: fewer drops than that, or equal drops of which only a part would have to split; the text lists the
            numbers of stages that the curve can have.
    Source: docs/method.md "Layer stages".
    """
    drops = sorted((drop for drop in _drops(curve) if drop > 0), reverse=True)
    if not len(curve):
        raise _refuse("curve must have at least one layer; got none")
    possible = [n for n in range(1, len(drops) + 2) if n == 1 or n > len(drops) or drops[n - 2] > drops[n - 1]]
    if num_stages not in possible:
        raise _refuse(f"num_stages must be one of {', '.join(map(str, possible))} for this curve; got {num_stages}")
    return drops[num_stages - 1] if num_stages <= len(drops) else 0.0


def check_starts(starts: Sequence[int], num_layers: int) -> list[int]:
    """Starts that were set by hand.

    Raises:
        ValueError: not whole numbers that ascend from 0 to at most num_layers - 1.
    """
    whole = all(isinstance(s, int) and not isinstance(s, bool) for s in starts)
    if not whole or not starts or starts[0] or any(a >= b for a, b in pairwise([*starts, num_layers])):
        raise _refuse(f"stages must ascend from 0 to below {num_layers} layers; got {list(starts)}")
    return list(starts)


def stage_sizes(starts: Sequence[int], num_layers: int) -> list[int]:
    """Layers of every stage. Raises ValueError as check_starts."""
    return [b - a for a, b in pairwise([*check_starts(starts, num_layers), num_layers])]


def stage_of_layer(starts: Sequence[int], num_layers: int) -> list[int]:
    """[L] stage of every layer, from 0. Raises ValueError as check_starts."""
    return [stage for stage, size in enumerate(stage_sizes(starts, num_layers)) for _ in range(size)]


# ---- tokens of a stage
def _tokens(name: str, value: int | float, n: int) -> int:
    """A whole number is tokens, a float in (0, 1] a share of n that counts as the decimal it prints as."""
    if isinstance(value, float) and 0 < value <= 1:
        return math.floor(Fraction(str(value)) * n + Fraction(1, 2))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refuse(f"{name} must be tokens (an integer from 1) or a share (a float in (0, 1]); got {value!r}")
    return value


def stage_tokens(
    n: int,
    num_stages: int,
    *,
    n_max: int | float | str = "prompt",
    n_min: int | float = N_MIN,
    n_step: int | None = None,
    floor: int = 8,
    prune_first: bool = False,
) -> list[int]:
    """Tokens of a prompt that go through the layers of each stage.

        step = floor((N_max - N_min) / K),  N_c = N_min + step * (K - c)      K + 1 stages, c = 0 ... K
        N_c = max(N_min, N_max - n_step * c)                                  with n_step

    Args:
        n: tokens of the prompt, at least 0.
        num_stages: K + 1, at least 1.
        n_max, n_min: an int is tokens, a float in (0, 1] a share of n (rounded half up), "prompt" is n.
        n_step: tokens that each stage has fewer than the one before; None shares the difference out evenly.
        floor: tokens that are never pruned: max(8, window) and sinks.
        prune_first: stage 0 is cut to its number as well (from layer 1 on), as in the paper's reference; otherwise it
            keeps all n.
    Returns:
        num_stages numbers that never rise. All are n where there is one stage, N_max <= N_min or n <= N_min.
    Raises:
        ValueError: a number outside these, naming the argument.
    Source: docs/method.md "Layer stages".
    """
    for name, value, least in (("n", n, 0), ("num_stages", num_stages, 1), ("floor", floor, 0), ("n_step", n_step, 1)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole and not (name == "n_step" and value is None):
            raise _refuse(f"{name} must be an integer of at least {least}; got {value!r}")
    most = n if n_max == "prompt" else _tokens("n_max", n_max, n)
    least, last = _tokens("n_min", n_min, n), num_stages - 1
    if not last or most <= least or n <= least:
        return [n] * num_stages
    if n_step is None:
        step = (most - least) // last
        wanted = [least + step * (last - stage) for stage in range(num_stages)]
    else:
        wanted = [max(least, most - n_step * stage) for stage in range(num_stages)]
    left, tokens = n, []
    for stage, number in enumerate(wanted):
        left = min(left, max(number, floor)) if stage or prune_first else n
        tokens.append(left)
    return tokens


def kept_work(starts: Sequence[int], num_layers: int, tokens: Sequence[int], n: int) -> tuple[float, float]:
    """What is left of a prompt's work: shares of its token-layers and of the n^2 of its attention.

    Args:
        starts, num_layers: as check_starts.
        tokens: of every stage, as stage_tokens.
        n: tokens of the prompt, at least 1.
    Raises:
        ValueError: as check_starts, or another number of stages.
    """
    sizes = stage_sizes(starts, num_layers)
    if len(tokens) != len(sizes) or n < 1:
        raise _refuse(
            f"tokens must hold {len(sizes)} numbers, one a stage, and n be at least 1; got {len(tokens)}, {n}"
        )
    linear = sum(size * number for size, number in zip(sizes, tokens, strict=True))
    square = sum(size * number**2 for size, number in zip(sizes, tokens, strict=True))
    return linear / (num_layers * n), square / (num_layers * n**2)


# ---- the retrieval layer
def retrieval_layer(curve: Sequence[float]) -> int:
    """The layer, neither the first nor the last, at which the curve rises most; ties to the lower layer.

    Args:
        curve: [L], at least 3 layers.
    Raises:
        ValueError: fewer layers, NaN or Inf.
    Source: docs/method.md "Layer stages".
    """
    if len(curve) < 3:
        raise _refuse(f"curve must have at least 3 layers; got {len(curve)}")
    drops = _drops(curve)
    return min(range(1, len(curve) - 1), key=lambda layer: (drops[layer - 1], layer))
