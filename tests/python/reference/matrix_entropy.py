# SPDX-License-Identifier: Apache-2.0
"""matrix_entropy in plain Python, one spectrum at a time."""

import math


def entropy_nats(shares, top, kind):
    shares = [float(s) for s in shares]
    if kind != "renyi2":
        shares = shares[:top]
    if any(math.isnan(s) for s in shares):
        return math.nan
    shares = [s for s in shares if s > 0]
    if not shares:
        return 0.0
    if kind == "renyi2":
        return -math.log(sum(s * s for s in shares))
    if kind == "renormalized":
        total = sum(shares)
        shares = [s / total for s in shares]
    return -sum(s * math.log(s) for s in shares)


def matrix_entropy(spectrum, top, dim, kind="truncated"):
    """Entropy as share of ln dim, and effective rank, of every row of spectrum [M, N]."""
    nats = [entropy_nats(row, top, kind) for row in spectrum.tolist()]
    return [h / math.log(dim) for h in nats], [math.exp(h) for h in nats]
