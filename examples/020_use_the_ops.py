# SPDX-License-Identifier: Apache-2.0
"""The operators by themselves: measure a prompt, give each head its budget, pack the cache, decode over it.

Random data with two kinds of heads: every second KV head sees queries of low rank, so its entropy is low and it gets
the smaller budget. Runs on CPU in seconds, on a GPU where there is one.
"""

import argparse
import math
import time

import torch

import uncomp
from uncomp import ops

WINDOW, POOL, GROUPS = 8, 7, 2


def prompt(seq_len, num_q_heads, num_kv_heads, dim, device):
    """Queries, keys and values of one layer; the query heads of even KV heads live in 4 dimensions."""
    group = num_q_heads // num_kv_heads
    query = torch.randn(1, num_q_heads, seq_len, dim, device=device)
    for head in range(0, num_kv_heads, 2):
        basis = torch.randn(4, dim, device=device)
        low = torch.randn(group, seq_len, 4, device=device) @ basis
        query[0, head * group : (head + 1) * group] = low
    key, value = (torch.randn(1, num_kv_heads, seq_len, dim, device=device) for _ in range(2))
    return query, key, value


def main():
    """Prints what each step did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=384, help="mean tokens a head keeps")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    heads, kv_heads, dim, device = 16, 4, 64, args.device
    scale = 1 / math.sqrt(dim)
    query, key, value = prompt(args.seq_len, heads, kv_heads, dim, device)
    info = uncomp.build_info()
    print(f"uncomp {info['version']}, torch {info['torch_running']}, CUDA kernels: {info['cuda']}, device: {device}")

    # 1. How much information does each head carry?
    spectrum = ops.matrix_spectrum(query, dim // 4)
    entropy, _ = ops.matrix_entropy(spectrum, dim // 4, dim)
    row_entropy = entropy.view(1, kv_heads, -1).mean(-1)

    # 2. Order the heads, cut them into groups, give each group its share of the budget.
    group, _ = ops.group_heads(row_entropy, GROUPS)
    weight = torch.tensor([2, 4], dtype=torch.int32, device=device)  # 1 - 1/3 and 1 + 1/3, as integers
    length = torch.full((1,), args.seq_len, dtype=torch.int32, device=device)
    total = torch.full((1,), kv_heads * args.budget, dtype=torch.int32, device=device)
    limit = ops.allocate_budget(group, weight, length, total, WINDOW)
    print("head  entropy  group  tokens kept")
    for head in range(kv_heads):
        print(f"{head:4d}  {row_entropy[0, head]:7.4f}  {group[0, head]:5d}  {limit[0, head]:6d} of {args.seq_len}")

    # 3. Score the tokens by the last queries, keep the best of each row, pack them.
    last = query[:, :, -WINDOW:]
    scores, lse = ops.window_scores(last, key, scale)
    rows = torch.full((kv_heads,), args.seq_len, dtype=torch.int32, device=device)
    kept = min(kv_heads * args.budget, kv_heads * args.seq_len)
    index, row_start = ops.select_tokens(scores, rows, limit.view(-1), kept, sink=0, window=WINDOW, pool=POOL)
    key_rows, value_rows, position, row_len = ops.compact_kv(key, value, index, row_start, row_start, kept)
    full = key.nbytes + value.nbytes
    print(f"cache: {key_rows.nbytes + value_rows.nbytes} bytes of {full} ({100 * kept / rows.sum().item():.2f} % kept)")

    # 4. Attention over the rows equals dense attention with everything else masked.
    probe = torch.randn(1, heads, 1, dim, device=device)
    out, _ = ops.decode_attention(probe, key_rows, value_rows, row_start, row_len, scale)
    mask = torch.full((kv_heads, args.seq_len), float("-inf"), device=device)
    for head in range(kv_heads):
        mask[head, index[row_start[head] : row_start[head + 1]].long()] = 0
    mask = mask.repeat_interleave(heads // kv_heads, 0)[None, :, None]
    dense = torch.nn.functional.scaled_dot_product_attention(
        probe, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    print(f"largest difference to dense attention with the dropped tokens masked: {(out - dense).abs().max():.2e}")

    # 5. Decode at constant length: every step writes one token and gives one up.
    votes = torch.empty(WINDOW, kept, dtype=torch.int32, device=device)
    vote_sum, order = (torch.empty(kept, dtype=torch.int32, device=device) for _ in range(2))
    vote_step = torch.empty(kv_heads, dtype=torch.int32, device=device)
    query_position = torch.arange(args.seq_len - WINDOW, args.seq_len, dtype=torch.int32, device=device)[None]
    ops.seed_votes_(
        last, lse, query_position, key_rows, position, row_start, row_len, votes, vote_sum, vote_step, order, scale
    )
    before = row_len.tolist()
    begin = time.perf_counter()
    for step in range(args.steps):
        new_query = torch.randn(1, heads, 1, dim, device=device)
        new_key, new_value = (torch.randn(1, kv_heads, 1, dim, device=device) for _ in range(2))
        now = torch.full((1,), args.seq_len + step, dtype=torch.int32, device=device)
        ops.decode_evict_(
            new_query,
            new_key,
            new_value,
            now,
            row_start,
            row_len,
            key_rows,
            value_rows,
            position,
            votes,
            vote_sum,
            vote_step,
            order,
            window=WINDOW,
            sink=0,
            pool=POOL,
            scale=scale,
        )
    newest = position.view(-1)[row_start[:-1].long()[0] : row_start[1]].max().item()
    seconds = time.perf_counter() - begin
    print(
        f"{args.steps} decode steps in {1e3 * seconds:.1f} ms; lengths before and after: {before} {row_len.tolist()}; "
        f"newest position in head 0: {newest}"
    )


if __name__ == "__main__":
    main()
