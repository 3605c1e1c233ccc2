// SPDX-License-Identifier: Apache-2.0
// select_tokens: checks, the C++ entry and the CPU body.
#include "ops/select_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "core/select_keys.h"
#include "ops/call.h"
#include "ops/check.h"
#include "ops/threads.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "select_tokens";

}  // namespace

std::tuple<at::Tensor, at::Tensor> select_tokens(const at::Tensor& scores, const at::Tensor& length,
                                                 const at::Tensor& keep_len, int64_t total_keep, int64_t sink,
                                                 int64_t window, int64_t pool, std::string_view pool_mode) {
  static const auto op = op_handle<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t, int64_t, std::string_view)>(
      "uncomp::select_tokens");
  return op.call(scores, length, keep_len, total_keep, sink, window, pool, pool_mode);
}

Pool check_select_tokens(const at::Tensor& scores, const at::Tensor& length, const at::Tensor& keep_len,
                         int64_t total_keep, int64_t sink, int64_t window, int64_t pool, std::string_view pool_mode) {
  check_dtype(kOp, "scores", scores, at::kFloat);
  check_rank(kOp, "scores", scores, 2, "[R, S]");
  check_last_contiguous(kOp, "scores", scores);
  check_int32(kOp, "length", length, {scores.size(0)}, "[R]", "scores", scores);
  check_int32(kOp, "keep_len", keep_len, {scores.size(0)}, "[R]", "scores", scores);
  check_int32_size(kOp, "rows R", scores.size(0));
  UNCOMP_CHECK_LIMIT(kOp, scores.size(1) <= kMaxSelectColumns, "columns S must be at most ", kMaxSelectColumns,
                     "; got ", scores.size(1));
  const int64_t room = scores.size(0) * scores.size(1);
  UNCOMP_CHECK_VALUE(kOp, total_keep >= 0 && total_keep <= room, "total_keep must lie in [0, R * S = ", room, "]; got ",
                     total_keep);
  UNCOMP_CHECK_VALUE(kOp, fits<int32_t>(total_keep), "total_keep must be below 2^31; got ", total_keep);
  UNCOMP_CHECK_VALUE(kOp, sink >= 0, "sink must be at least 0; got ", sink);
  UNCOMP_CHECK_VALUE(kOp, window >= 0, "window must be at least 0; got ", window);
  check_pool_width(kOp, pool);
  return parse_pool(kOp, pool_mode);
}

namespace {

/// Calls `keep(column)` for the tokens of one row that stay, ascending.
template <class Keep>
void select_one_row(const float* scores, const SelectRow& row, int32_t half, Pool mode, std::vector<uint32_t>& keys,
                    std::vector<uint32_t>& sorted, const Keep& keep) {
  const int32_t end = row.tokens - row.tail;
  for (int32_t c = 0; c < row.head; ++c) keep(c);
  if (row.need > 0) {
    keys.resize(end - row.head);
    const auto load = [&](int32_t c) { return scores[c]; };
    for (int32_t c = row.head; c < end; ++c) keys[c - row.head] = pooled_key(load, c, half, end, mode);
    sorted = keys;
    std::nth_element(sorted.begin(), sorted.begin() + (row.need - 1), sorted.end(), std::greater<>());
    const uint32_t threshold = sorted[row.need - 1];
    int64_t ties = row.need;
    for (const uint32_t key : keys) ties -= key > threshold;
    for (int32_t c = row.head; c < end; ++c) {
      const uint32_t key = keys[c - row.head];
      if (key > threshold || (key == threshold && ties-- > 0)) keep(c);
    }
  }
  for (int32_t c = end; c < row.tokens; ++c) keep(c);
}

std::tuple<at::Tensor, at::Tensor> select_tokens_cpu(const at::Tensor& scores, const at::Tensor& length,
                                                     const at::Tensor& keep_len, int64_t total_keep, int64_t sink,
                                                     int64_t window, int64_t pool, std::string_view pool_mode) {
  const Pool mode = check_select_tokens(scores, length, keep_len, total_keep, sink, window, pool, pool_mode);
  const int64_t rows = scores.size(0), stride = scores.stride(0);
  const int32_t columns = static_cast<int32_t>(scores.size(1)), half = static_cast<int32_t>(pool / 2);
  const int32_t sinks = static_cast<int32_t>(std::min<int64_t>(sink, columns));
  const int32_t newest = static_cast<int32_t>(std::min<int64_t>(window, columns));
  const float* from = scores.const_data_ptr<float>();
  const int32_t* length_data = length.const_data_ptr<int32_t>();
  const int32_t* keep_data = keep_len.const_data_ptr<int32_t>();
  at::Tensor index = at::empty({total_keep}, length.options()), row_start = at::empty({rows + 1}, length.options());
  int32_t* out = index.mutable_data_ptr<int32_t>();
  int32_t* start = row_start.mutable_data_ptr<int32_t>();

  int64_t sum = 0;
  for (int64_t r = 0; r < rows; ++r) {
    start[r] = static_cast<int32_t>(std::min(sum, total_keep));
    sum += select_row(length_data[r], keep_data[r], columns, sinks, newest).keep;
  }
  start[rows] = static_cast<int32_t>(std::min(sum, total_keep));
  std::fill(out + start[rows], out + total_keep, -1);

  const int64_t threads = shared_by(rows, threads_for(scores.numel() * 8));
  std::vector<std::vector<uint32_t>> keys(threads), sorted(threads);
  share(rows, threads, [&](int64_t r, int64_t thread) {
    int32_t place = start[r];
    select_one_row(from + r * stride, select_row(length_data[r], keep_data[r], columns, sinks, newest), half, mode,
                   keys[thread], sorted[thread], [&](int32_t column) {
                     if (place < start[r + 1]) out[place++] = column;
                   });
  });
  return {index, row_start};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("select_tokens", &select_tokens_cpu); }

}  // namespace
}  // namespace uncomp
