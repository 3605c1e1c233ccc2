// SPDX-License-Identifier: Apache-2.0
// What the operators that move keys and values into an arena share: checks of dense K and V, of row starts, strides.
#pragma once

#include <initializer_list>

#include "core/lanes.h"
#include "core/ragged.h"
#include "ops/check.h"

namespace uncomp {

/// Tokens of a row that one task of a CPU body moves.
inline constexpr int32_t kTaskTokens = 256;

/// key and value: same float dtype and device, same sizes but the last, contiguous in the last dimension.
inline void check_kv(const char* op, const at::Tensor& key, const at::Tensor& value, int64_t rank, const char* shape) {
  check_float(op, "key", key);
  check_rank(op, "key", key, rank, shape);
  check_same_dtype(op, "value", value, "key", key);
  check_device(op, "value", value, "key", key);
  check_rank(op, "value", value, rank, shape);
  for (int64_t d = 0; d + 1 < rank; ++d) {
    UNCOMP_CHECK_VALUE(op, value.size(d) == key.size(d), "value must have the sizes of key but for the last; got ",
                       value.sizes(), " for ", key.sizes());
  }
  for (const auto& [name, t] : {std::pair<const char*, const at::Tensor&>{"key", key}, {"value", value}}) {
    UNCOMP_CHECK_VALUE(op, t.size(-1) >= 1, name, " must have at least one channel; got ", t.sizes());
    check_last_contiguous(op, name, t);
    check_int32_size(op, "a token in bytes", t.size(-1) * t.element_size());
  }
}

/// Which sequence and KV head each of `num_rows` rows reads from a dense `key` [B, Hkv, ...].
inline RowSources check_row_sources(const char* op, const at::Tensor& key, int64_t num_rows) {
  const int64_t batch = key.size(0), heads = key.size(1);
  const int64_t multiple = batch * heads;
  UNCOMP_CHECK_VALUE(op, multiple > 0 ? num_rows % multiple == 0 : num_rows == 0,
                     "row_start must have a multiple of B * Hkv = ", multiple, " rows; got ", num_rows);
  if (num_rows == 0) return {1, 1};
  return {static_cast<int32_t>(num_rows / batch), static_cast<int32_t>(heads)};
}

/// row_start [R + 1] beside `ref`; returns R.
inline int32_t check_row_start(const char* op, const at::Tensor& row_start, const char* ref_name,
                               const at::Tensor& ref) {
  check_rank(op, "row_start", row_start, 1, "[R + 1]");
  UNCOMP_CHECK_VALUE(op, row_start.size(0) >= 1, "row_start must have shape [R + 1]; got ", row_start.sizes());
  check_int32(op, "row_start", row_start, {row_start.size(0)}, "[R + 1]", ref_name, ref);
  return check_int32_size(op, "rows", row_start.size(0) - 1);
}

/// CPU bodies only: starts ascend from 0 or more to at most `limit`.
inline void check_ascending(const char* op, const char* name, const int32_t* starts, int64_t rows, int64_t limit) {
  for (int64_t r = 0; r < rows; ++r) {
    UNCOMP_CHECK_VALUE(op, starts[r] >= 0 && starts[r] <= starts[r + 1] && starts[r + 1] <= limit, name,
                       " must ascend from 0 or more to at most ", limit, "; got ", starts[r], " and ", starts[r + 1],
                       " for row ", r);
  }
}

/// CPU bodies only: valid tokens lie inside the tensor.
inline void check_valid_tokens(const char* op, const ValidTokens& valid, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = valid.first == nullptr ? 0 : valid.first[b];
    UNCOMP_CHECK_VALUE(op, first >= 0 && first <= valid.seq_len, "first must lie in [0, ", valid.seq_len, "]; got ",
                       first, " for sequence ", b);
    const int64_t length = valid.length == nullptr ? 0 : valid.length[b];
    UNCOMP_CHECK_VALUE(op, length >= 0 && first + length <= valid.seq_len, "first + length must lie in [0, ",
                       valid.seq_len, "]; got ", first, " + ", length, " for sequence ", b);
  }
}

/// Strides of [B, H, S, D] in bytes, or of [C, D] as `token` alone. A dimension of one element has none that count.
inline Strides3 byte_strides(const at::Tensor& t) {
  const auto stride = [&](int64_t d) { return t.size(d) <= 1 ? 0 : t.stride(d) * t.element_size(); };
  return t.dim() == 2 ? Strides3{0, 0, stride(0)} : Strides3{stride(0), stride(1), stride(2)};
}

/// Widest access that every token of sources and targets allows.
inline int32_t kv_lane_bytes(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_rows,
                             const at::Tensor& value_rows) {
  int64_t lane = 16;
  for (const auto& [source, rows] :
       {std::pair<const at::Tensor&, const at::Tensor&>{key, key_rows}, {value, value_rows}}) {
    const Strides3 stride = byte_strides(source);
    lane = common_lane_bytes({lane, reinterpret_cast<int64_t>(source.const_data_ptr()),
                              reinterpret_cast<int64_t>(rows.const_data_ptr()), stride.batch, stride.head, stride.token,
                              source.size(-1) * source.element_size()});
  }
  return static_cast<int32_t>(lane);
}

}  // namespace uncomp
