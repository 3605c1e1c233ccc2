// SPDX-License-Identifier: Apache-2.0
// Kernel floor of compact_kv: chosen tokens of dense K and V, or of an arena, into the rows of a new arena.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/ragged.h"

namespace uncomp::kernels {

struct CompactKvParams {
  const char* key;                 // [B, Hkv, S, Dk] or [C0, Dk]
  const char* value;               // [B, Hkv, S, Dv] or [C0, Dv]
  Strides3 key_stride;             // bytes; of an arena only `token` counts
  Strides3 value_stride;           // bytes
  const int32_t* position;         // [B, S] or null (tokens counted from first); [C0] of an arena
  const int32_t* first;            // [B] or null, tokens
  const int32_t* source_start;     // [R + 1] slots of the old arena; null for a dense source
  const int32_t* index;            // [total] tokens, counted from first or from the row's start
  const int32_t* index_start;      // [R + 1] entries of index
  RaggedRows rows;                 // of the new arena; its row_len is not read
  int32_t* row_len;                // [R] tokens
  char* key_rows;                  // [C, Dk]
  char* value_rows;                // [C, Dv]
  int32_t* slot_position;          // [C]
  int64_t source_slots;            // C0, 0 for a dense source
  RowSources sources;              // of a dense source
  int32_t seq_len, total;          // tokens, entries
  int32_t key_bytes, value_bytes;  // of one token
  int32_t lane_bytes;              // 16, 8, 4 or 2: widest access that every token of source and target allows
};

cudaError_t compact_kv(const CompactKvParams& params, cudaStream_t stream);

}  // namespace uncomp::kernels
