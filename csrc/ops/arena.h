// SPDX-License-Identifier: Apache-2.0
// Checks that every operator over an arena of ragged rows shares.
#pragma once

#include "core/ragged.h"
#include "ops/check.h"

namespace uncomp {

/// Types, shapes and devices of an arena that is read: key_rows [C, Dk], value_rows [C, Dv], row_start [R + 1],
/// row_len [R], all where `query` is. Returns R.
inline int32_t check_arena(const char* op, const at::Tensor& key_rows, const at::Tensor& value_rows,
                           const at::Tensor& row_start, const at::Tensor& row_len, const at::Tensor& query) {
  const auto check_rows = [&](const char* name, const at::Tensor& t, const char* shape) {
    check_same_dtype(op, name, t, "query", query);
    check_device(op, name, t, "query", query);
    check_rank(op, name, t, 2, shape);
    check_contiguous(op, name, t);
    check_head_dim(op, name, t.size(1));
    check_aligned(op, name, t);
  };
  check_rows("key_rows", key_rows, "[C, Dk]");
  check_rows("value_rows", value_rows, "[C, Dv]");
  UNCOMP_CHECK_VALUE(op, key_rows.size(0) == value_rows.size(0), "value_rows must have ", key_rows.size(0),
                     " slots like key_rows; got ", value_rows.size(0));
  check_int32_size(op, "slots of key_rows", key_rows.size(0));
  check_rank(op, "row_len", row_len, 1, "[R]");
  check_int32(op, "row_len", row_len, {row_len.size(0)}, "[R]", "query", query);
  check_int32(op, "row_start", row_start, {row_len.size(0) + 1}, "[R + 1]", "query", query);
  return check_int32_size(op, "rows", row_len.size(0));
}

/// How the query heads of one sequence share its cache rows: rows = R / B, group size = Hq / rows.
struct HeadLayout {
  int32_t rows_per_sequence, group_size;
};

inline HeadLayout check_head_layout(const char* op, int64_t batch, int64_t num_q_heads, int64_t num_rows) {
  UNCOMP_CHECK_VALUE(op, num_q_heads >= 1, "query must have at least one head; got ", num_q_heads);
  check_int32_size(op, "batch times heads of query", batch * num_q_heads);
  if (batch == 0) {
    UNCOMP_CHECK_VALUE(op, num_rows == 0, "row_len must have no rows for a batch of 0; got ", num_rows);
    return {1, 1};
  }
  UNCOMP_CHECK_VALUE(op, num_rows >= batch && num_rows % batch == 0, "row_len must have a multiple of the batch size ",
                     batch, " as its rows; got ", num_rows);
  const int64_t rows = num_rows / batch;
  UNCOMP_CHECK_VALUE(op, num_q_heads % rows == 0, "query must have a multiple of the ", rows,
                     " rows of a sequence as its heads; got ", num_q_heads);
  const int64_t group = num_q_heads / rows;
  UNCOMP_CHECK_LIMIT(op, group <= kMaxGroupSize, "query must have at most ", kMaxGroupSize, " heads for each row; got ",
                     group);
  return {static_cast<int32_t>(rows), static_cast<int32_t>(group)};
}

/// What the launches of all attention over an arena read and write, but for the strides of the query.
template <class Params>
void set_arena(Params& params, const at::Tensor& query, const at::Tensor& key_rows, const at::Tensor& value_rows,
               const at::Tensor& row_start, const at::Tensor& row_len, const HeadLayout& layout, double scale,
               const at::Tensor& out, const at::Tensor& lse) {
  params.query = query.const_data_ptr();
  params.key_rows = key_rows.const_data_ptr();
  params.value_rows = value_rows.const_data_ptr();
  params.rows = {row_start.const_data_ptr<int32_t>(), row_len.const_data_ptr<int32_t>(), key_rows.size(0),
                 static_cast<int32_t>(row_len.size(0))};
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  params.rows_per_sequence = layout.rows_per_sequence;
  params.group_size = layout.group_size;
  params.key_dim = static_cast<int32_t>(key_rows.size(1));
  params.value_dim = static_cast<int32_t>(value_rows.size(1));
  params.scale = static_cast<float>(scale);
  params.dtype = kernel_dtype(query);
}

/// The layout as plain numbers on the CPU, after a look at every one of them: ValueError for a row that is out of
/// order, outside the arena or longer than its room.
inline RaggedRows checked_rows(const char* op, const at::Tensor& row_start, const at::Tensor& row_len,
                               int64_t capacity) {
  const RaggedRows rows{row_start.const_data_ptr<int32_t>(), row_len.const_data_ptr<int32_t>(), capacity,
                        static_cast<int32_t>(row_len.size(0))};
  for (int32_t r = 0; r < rows.num_rows; ++r) {
    const int64_t start = rows.row_start[r], end = rows.row_start[r + 1];
    UNCOMP_CHECK_VALUE(op, start >= 0 && start <= end && end <= capacity,
                       "row_start must ascend from 0 or more to at most ", capacity, " slots; got ", start, " and ",
                       end, " for row ", r);
    UNCOMP_CHECK_VALUE(op, rows.row_len[r] >= 0 && rows.row_len[r] <= end - start,
                       "row_len must lie in [0, room]; got ", rows.row_len[r], " for row ", r, " with room ",
                       end - start);
  }
  return rows;
}

}  // namespace uncomp
