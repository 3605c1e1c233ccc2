// SPDX-License-Identifier: Apache-2.0
// Contract of select_tokens.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "core/dtype.h"

namespace uncomp {

/// Chooses, for every row, the tokens that stay.
///
/// scores      [R, S] float32  larger means keep; rows may be strided. -0 equals +0, NaN is smaller than any number
/// length      [R] int32       tokens n of the row, columns 0 .. n - 1; clamped to [0, S]
/// keep_len    [R] int32       tokens to keep; clamped to [min(sink + window, n), n]
/// total_keep                  sum of the clamped keep_len, known to the caller; sizes the output
/// sink, window                first and last tokens that stay in any case; at least 0
/// pool                        odd width of the pooling over the tokens before the window, sinks included
/// pool_mode                   "max": columns outside are ignored, NaN counts only where the whole window is NaN.
///                             "avg": columns outside count 0, the divisor is pool; NaN spreads. Sums run upwards in
///                             fp32, so every device gives the same bits
///
/// Returns    index [total_keep] int32, ascending inside a row; row_start [R + 1] int32, entries of index.
///            Ties go to the lower index.
/// Raises     TypeError            scores not float32, length or keep_len not int32
///            ValueError           a wrong shape, device or layout, total_keep outside [0, R * S] or not an int32, a
///                                 negative sink or window, an even pool, an unknown pool_mode
///            NotImplementedError  S above 2^30, pool above 129
/// Cost       reads scores once, no host sync. A total_keep below the sum cuts the last rows (row_start is clamped to
///            it), one above it leaves a tail of -1; nothing is written out of bounds.
/// Source     docs/method.md "Selection"; truth: tests/python/reference/select_tokens.py.
std::tuple<at::Tensor, at::Tensor> select_tokens(const at::Tensor& scores, const at::Tensor& length,
                                                 const at::Tensor& keep_len, int64_t total_keep, int64_t sink,
                                                 int64_t window, int64_t pool = 1, std::string_view pool_mode = "max");

/// Raises what the contract says; called first by every body.
Pool check_select_tokens(const at::Tensor& scores, const at::Tensor& length, const at::Tensor& keep_len,
                         int64_t total_keep, int64_t sink, int64_t window, int64_t pool, std::string_view pool_mode);

}  // namespace uncomp
