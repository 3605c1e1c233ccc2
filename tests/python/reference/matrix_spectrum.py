# SPDX-License-Identifier: Apache-2.0
"""matrix_spectrum by the definition, one head at a time, from singular values instead of eigenvalues."""

import torch


def head_spectrum(tokens, top):
    """Shares of the trace, descending, of the tokens [n, D] of one head."""
    x = tokens.double().cpu()
    zeros = torch.zeros(top, dtype=torch.float64)
    if x.shape[0] == 0:
        return zeros
    if not torch.isfinite(x).all():
        return zeros + float("nan")
    centred = x - x.mean(dim=0)
    size = centred.abs().amax(dim=1, keepdim=True)
    size[size == 0] = 1
    scaled = centred / size
    length = scaled.norm(dim=1, keepdim=True)
    near_mean = length <= 1e-5 * (x / size).norm(dim=1, keepdim=True)
    unit = torch.where(near_mean, torch.zeros_like(scaled), scaled / length)
    squares = torch.linalg.svdvals(unit) ** 2
    total = squares.sum()
    if total == 0:
        return zeros
    kept = (squares / total)[:top]
    zeros[: kept.numel()] = kept
    return zeros


def matrix_spectrum(states, first, length, top):
    batch, heads, tokens, _ = states.shape
    out = torch.zeros(batch, heads, top, dtype=torch.float64)
    for b in range(batch):
        begin = 0 if first is None else int(first[b])
        count = tokens - begin if length is None else int(length[b])
        for h in range(heads):
            out[b, h] = head_spectrum(states[b, h, begin : begin + count], top)
    return out
