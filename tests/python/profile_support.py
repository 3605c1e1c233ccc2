# SPDX-License-Identifier: Apache-2.0
"""Made-up head profiles of any shape."""

from __future__ import annotations

import math
import random

from uncomp.calibration.profile import CalibrationRun, HeadProfile, ModelFacts


def made_profile(
    layers: int, query_heads: int, kv_heads: int, dim: int = 64, *, noise: float = 0.03, seed: int = 0, samples: int = 5
) -> HeadProfile:
    """A profile of one made-up model of this shape; another seed is another text, more noise a stranger one."""
    fixed, rng = random.Random("model"), random.Random(seed)
    truth = [[0.4 + 0.1 * fixed.gauss(0, 1) for _ in range(query_heads)] for _ in range(layers)]
    entropy = [[min(0.99, max(0.01, v + rng.gauss(0, noise))) for v in heads] for heads in truth]
    spectrum = [math.exp(-9 * i / dim) for i in range(dim)]
    votes = {}
    for name, rows in (("kv_head", kv_heads), ("query_head", query_heads)):
        size = query_heads // rows
        means = [[sum(heads[i * size : (i + 1) * size]) / size for i in range(rows)] for heads in entropy]
        votes[name] = [_votes(heads, noise, samples, rng) for heads in means]
    return HeadProfile(
        model=ModelFacts("llama", layers, query_heads, kv_heads, dim, "0" * 64),
        run=CalibrationRun(samples, 1024, 42, max(1, dim // 4), "truncated", {"entropy": "mean"}, "0" * 64),
        entropy=entropy,
        entropy_full=entropy,
        spectrum=[s / sum(spectrum) for s in spectrum],
        curve=[sum(math.exp(v) for v in heads) for heads in entropy],
        rank_votes=votes,
    )


def _votes(heads: list[float], noise: float, samples: int, rng: random.Random) -> list[list[int]]:
    votes = [[0] * len(heads) for _ in heads]
    for _ in range(samples):
        noisy = [v + rng.gauss(0, noise) for v in heads]
        for rank, row in enumerate(sorted(range(len(heads)), key=noisy.__getitem__)):
            votes[row][rank] += 1
    return votes
