// SPDX-License-Identifier: Apache-2.0
// Contract of window_scores.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "core/dtype.h"

namespace uncomp {

/// Attention mass that the last W queries put on every key, reduced over the window and over the query heads that
/// share the key. Query i (0 .. W - 1) is token n - W + i of a sequence of n tokens and sees keys 0 .. n - W + i;
/// where that is negative the query does not exist.
///
/// query      [B, Hq, W, D]   rotated; any strides with D contiguous; W 1 to 64
/// key        [B, Hkv, S, D]  dense prompt, any strides with D contiguous; or [C, D], an arena whose rows lie in
///                            position order
/// value                      optional, layout and dtype of key, any width: the L2 norm of a token's value multiplies
///                            its score
/// first      [B] int32       optional, dense only: first real column of a sequence; output column 0 is this one
/// length     [B] int32       optional, dense only: real tokens of a sequence; default all behind `first`
/// row_start  [R + 1] int32   arena only, slots
/// row_len    [R] int32       arena only, tokens
/// columns                    arena only: width of scores; tokens behind it are seen by the softmax but not returned
/// scale                      factor of the logits
/// reduce_window              "sum", or "mean" over the min(W, n) queries that exist
/// reduce_group               "mean", "sum" or "max" over the g heads of a row, after the softmax and the window; or
///                            "none": one row per query head
///
/// Returns  scores [R, S or columns] float32, R = B * Hkv or the rows of the arena, B * Hq with "none"; column j is
///          token j, the window's own columns included, 0 behind the last token.
///          lse [B, Hq, W] float32, natural log; -inf for a query that does not exist.
///          A logit that is NaN or +inf makes the lse of its query NaN, and all scores that this query adds to.
/// Raises   TypeError            query not float32, float16 or bfloat16; another dtype in key or value; a layout
///                               tensor that is not int32
///          ValueError           a wrong shape, mixed devices, options of the other mode, an unknown reduction, a last
///                               dimension that is not contiguous, on CUDA rows that are not 16-byte aligned; on CPU
///                               first, length, row_start or row_len outside their tensors
///          NotImplementedError  a head dim that is not a multiple of 8 or above 256, W above 64, more than 16 query
///                               heads for a row, 2^30 tokens or more in a row
///          On CUDA lengths are clamped into their tensors.
/// Cost     reads key twice (the second time partly from L2) and value once; 4 * Hq * W * tokens * D flops; no
///          heads x W x S matrix exists; no host sync; bitwise repeatable.
/// Source   docs/method.md "Scoring"; truth: tests/python/reference/window_scores.py.
std::tuple<at::Tensor, at::Tensor> window_scores(
    const at::Tensor& query, const at::Tensor& key, const std::optional<at::Tensor>& value,
    const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& length,
    const std::optional<at::Tensor>& row_start, const std::optional<at::Tensor>& row_len, int64_t columns, double scale,
    std::string_view reduce_window, std::string_view reduce_group);

/// Sizes and choices of one call, after all checks.
struct WindowScoresPlan {
  int32_t batch, num_q_heads, window, head_dim;
  int32_t num_rows;           // rows of keys: B * Hkv, or R of the arena
  int32_t rows_per_sequence;  // num_rows / B
  int32_t group_size;         // query heads of a row
  int32_t score_rows;         // rows of scores
  int32_t width;              // columns of scores
  Reduce reduce_window, reduce_group;
  bool arena;
};

/// Raises what the contract says; called first by every body.
WindowScoresPlan check_window_scores(const at::Tensor& query, const at::Tensor& key,
                                     const std::optional<at::Tensor>& value, const std::optional<at::Tensor>& first,
                                     const std::optional<at::Tensor>& length,
                                     const std::optional<at::Tensor>& row_start,
                                     const std::optional<at::Tensor>& row_len, int64_t columns, double scale,
                                     std::string_view reduce_window, std::string_view reduce_group);

}  // namespace uncomp
