// SPDX-License-Identifier: Apache-2.0
// Kernel floor of append_kv_: new tokens into the free slots behind every row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/ragged.h"

namespace uncomp::kernels {

struct AppendKvParams {
  const char* key;          // [B, Hkv, T, Dk]
  const char* value;        // [B, Hkv, T, Dv]
  Strides3 key_stride;      // bytes
  Strides3 value_stride;    // bytes
  const int32_t* position;  // [B, T]
  ValidTokens valid;        // of T; its seq_len is T
  RaggedRows rows;          // row_len is `row_len` below
  int32_t* row_len;         // [R] tokens; read, then advanced
  char* key_rows;           // [C, Dk]
  char* value_rows;         // [C, Dv]
  int32_t* slot_position;   // [C]
  RowSources sources;
  int32_t key_bytes, value_bytes;  // of one token
  int32_t lane_bytes;              // 16, 8, 4 or 2: widest access that every token of source and target allows
};

/// num_rows * T must be below 2^31.
cudaError_t append_kv(const AppendKvParams& params, cudaStream_t stream);

}  // namespace uncomp::kernels
