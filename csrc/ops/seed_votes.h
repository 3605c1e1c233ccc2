// SPDX-License-Identifier: Apache-2.0
// Contract of seed_votes_.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "core/dtype.h"

namespace uncomp {

/// Fills the vote state of a freshly packed arena from the last Wd prompt queries, so that the first decode step can
/// already choose. The vote of query i on a slot is its softmax weight exp(scale * q.k - lse), reduced over the g
/// heads of the row, as a fixed-point integer (core/votes.h).
///
/// query           [B, Hq, W, D]   rotated; any strides with D contiguous; the newest Wd of the W vote
/// lse             [B, Hq, W]      float32, contiguous, natural log: from window_scores over the whole prompt
/// query_position  [B, W] int32    original positions; -1 where a query does not exist
/// key_rows        [C, D]          arena, dtype of query, D contiguous
/// slot_position   [C] int32       original positions of the live slots
/// row_start       [R + 1] int32   slots;  row_len [R] int32  tokens; R = B * rows, g = Hq / rows
/// votes           [Wd, C] int32   overwritten: row 0 is the oldest of the Wd queries; 0 where the query does not
///                                 exist or is older than the slot's token
/// vote_sum        [C] int32       overwritten: sum of the column of votes
/// vote_step       [R] int32       overwritten with 0: the vote row that the next step replaces, modulo Wd
/// order           [C] int32       overwritten: slot i of a row is its i-th token, counted from the row's start
/// scale                           factor of the logits
/// reduce_group                    "mean", "sum" (chooses as the mean does and is stored as it) or "max"
///
/// In the dead slots of a row's room votes, vote_sum and order become 0; slots outside every row stay as they are.
/// A weight that is NaN votes 0.
/// Raises   TypeError            query not float32, float16 or bfloat16; another dtype in key_rows; lse not float32;
///                               a layout or state tensor that is not int32
///          ValueError           a wrong shape, mixed devices, more vote rows than queries, an unknown reduction,
///                               tensors that are not contiguous, a scale that is not finite in float32, memory shared
///                               by what is written with another argument, on CUDA rows that are not 16-byte aligned;
///                               on CPU a row outside the arena or longer than its room
///          NotImplementedError  a head dim that is not a multiple of 8 or above 256, W above 64, more than 16 query
///                               heads for a row, 2^30 slots or more
///          On CUDA lengths are clamped into the row's room and starts into the arena.
/// Cost     reads each live key once, writes 4 * Wd + 8 bytes a slot; 2 * g * Wd * D flops a slot; no host sync.
/// Source   docs/method.md "Decode"; truth: tests/python/reference/seed_votes.py.
void seed_votes_(const at::Tensor& query, const at::Tensor& lse, const at::Tensor& query_position,
                 const at::Tensor& key_rows, const at::Tensor& slot_position, const at::Tensor& row_start,
                 const at::Tensor& row_len, at::Tensor votes, at::Tensor vote_sum, at::Tensor vote_step,
                 at::Tensor order, double scale, std::string_view reduce_group);

/// Sizes and choices of one call, after all checks.
struct SeedVotesPlan {
  int32_t batch, window, vote_window, head_dim;
  int32_t num_rows, rows_per_sequence, group_size;
  Reduce reduce_group;  // mean or max
};

/// Raises what the contract says; called first by every body.
SeedVotesPlan check_seed_votes(const at::Tensor& query, const at::Tensor& lse, const at::Tensor& query_position,
                               const at::Tensor& key_rows, const at::Tensor& slot_position, const at::Tensor& row_start,
                               const at::Tensor& row_len, const at::Tensor& votes, const at::Tensor& vote_sum,
                               const at::Tensor& vote_step, const at::Tensor& order, double scale,
                               std::string_view reduce_group);

}  // namespace uncomp
