// SPDX-License-Identifier: Apache-2.0
// Rows of different lengths inside one arena, and the invariants that every operator may rely on.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace uncomp {

/// Layout of R rows in an arena of `capacity` slots. Rows are sequence-major: row r belongs to sequence
/// r / (R / B). Starts and lengths may be device data, so every read is clamped: no value in them makes a
/// kernel touch a slot outside the arena.
struct RaggedRows {
  const int32_t* row_start;  // [R + 1] slots, ascending, row_start[R] <= capacity
  const int32_t* row_len;    // [R]     tokens, 0 <= row_len[r] <= room(r)
  int64_t capacity;          // slots
  int32_t num_rows;          // R

  UNCOMP_HD int64_t start(int32_t row) const { return clamp<int64_t>(row_start[row], 0, capacity); }
  /// Slots that row owns.
  UNCOMP_HD int32_t room(int32_t row) const {
    const int64_t end = clamp<int64_t>(row_start[row + 1], 0, capacity);
    return static_cast<int32_t>(max_of<int64_t>(end - start(row), 0));
  }
  /// Live tokens of a row.
  UNCOMP_HD int32_t len(int32_t row) const { return clamp<int32_t>(row_len[row], 0, room(row)); }
};

/// The real tokens of a padded sequence: columns first .. first + length - 1 of `seq_len`. Null pointers mean
/// "all columns". Values are clamped into the tensor.
struct ValidTokens {
  const int32_t* first;   // [B] or null, tokens
  const int32_t* length;  // [B] or null, tokens
  int32_t seq_len;        // columns of the dense tensor

  UNCOMP_HD int32_t begin(int32_t sequence) const {
    return first == nullptr ? 0 : clamp<int32_t>(first[sequence], 0, seq_len);
  }
  UNCOMP_HD int32_t count(int32_t sequence) const {
    const int32_t room = seq_len - begin(sequence);
    return length == nullptr ? room : clamp<int32_t>(length[sequence], 0, room);
  }
};

/// Which sequence and which KV head a cache row reads. With more rows than KV heads, neighbours share a head.
struct RowSources {
  int32_t rows_per_sequence;  // a multiple of num_kv_heads
  int32_t num_kv_heads;

  UNCOMP_HD constexpr int32_t sequence(int32_t row) const { return row / rows_per_sequence; }
  UNCOMP_HD constexpr int32_t kv_head(int32_t row) const {
    return row % rows_per_sequence / (rows_per_sequence / num_kv_heads);
  }
};

/// Strides of a [B, H, S, D] tensor in elements; D is contiguous.
struct Strides3 {
  int64_t batch;
  int64_t head;
  int64_t token;
};

}  // namespace uncomp
