# SPDX-License-Identifier: Apache-2.0
"""window_scores, one row at a time in float64."""

import torch


def weights_of_row(queries, keys, scale):
    """Softmax weights [g, W, n] and lse [g, W] of the last W queries; a query that does not exist has 0 and -inf."""
    group, window, _ = queries.shape
    n = keys.shape[0]
    logits = queries.double() @ keys.double().T * scale
    sees = torch.arange(n) <= torch.arange(n - window, n)[:, None]
    exists = sees.any(1)
    logits = logits[:, exists].masked_fill(~sees[exists], float("-inf"))
    weights = torch.zeros(group, window, n, dtype=torch.float64)
    lse = torch.full((group, window), float("-inf"), dtype=torch.float64)
    weights[:, exists] = torch.softmax(logits, 2).masked_fill(~sees[exists], 0.0)
    lse[:, exists] = torch.logsumexp(logits, 2)
    lse[lse == float("inf")] = float("nan")
    return weights, lse


def reduce_weights(weights, reduce_window, reduce_group):
    """[g, W, n] to [1 or g, n]: window first, group second."""
    mass = weights.sum(1)
    if reduce_window == "mean":
        mass = mass / max(min(weights.shape[1], weights.shape[2]), 1)
    if reduce_group == "none":
        return mass
    return {"mean": mass.mean, "sum": mass.sum, "max": mass.amax}[reduce_group](0, keepdim=True)


def window_scores(
    query,
    key,
    scale,
    *,
    value=None,
    first=None,
    length=None,
    row_start=None,
    row_len=None,
    columns=0,
    reduce_window="sum",
    reduce_group="mean",
):
    """Same arguments and results as uncomp.ops.window_scores, in float64."""
    query, key = query.cpu(), key.cpu()
    value = None if value is None else value.cpu().double()
    batch, heads, window, _ = query.shape
    rows = len(row_len) if row_len is not None else batch * key.shape[1]
    per_sequence = rows // max(batch, 1)
    group = heads // max(per_sequence, 1)
    width = columns if row_len is not None else key.shape[2]
    out, lse = [], torch.full((batch, heads, window), float("-inf"), dtype=torch.float64)
    for row in range(rows):
        b, h = divmod(row, per_sequence)
        if row_len is not None:
            begin, n = int(row_start[row]), int(row_len[row])
            tokens = slice(begin, begin + n)
            keys, values = key[tokens], None if value is None else value[tokens]
        else:
            begin = 0 if first is None else int(first[b])
            n = key.shape[2] - begin if length is None else int(length[b])
            tokens = slice(begin, begin + n)
            keys, values = key[b, h, tokens], None if value is None else value[b, h, tokens]
        mine = slice(h * group, (h + 1) * group)
        weights, lse[b, mine] = weights_of_row(query[b, mine], keys, scale)
        scores = reduce_weights(weights, reduce_window, reduce_group)
        if values is not None:
            scores = scores * values.norm(dim=1)
        padded = torch.zeros(scores.shape[0], width, dtype=torch.float64)
        padded[:, : min(n, width)] = scores[:, :width]
        out.append(padded)
    return torch.cat(out) if out else torch.zeros(0, width, dtype=torch.float64), lse
