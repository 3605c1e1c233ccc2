// SPDX-License-Identifier: Apache-2.0
// Kernel floor of ragged_attention: new tokens over ragged rows, and causally over each other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/ragged.h"

namespace uncomp::kernels {

struct RaggedAttentionParams {
  const void* query;           // [B, Hq, T, Dk], Dk contiguous
  Strides3 query_strides;      // elements
  const void* key;             // [B, Hkv, T, Dk] new tokens, rows on 16-byte borders; null: none
  const void* value;           // [B, Hkv, T, Dv] likewise
  Strides3 key_strides;        // elements
  Strides3 value_strides;      // elements
  const void* other_out;       // [B, Hq, T, Dv] attention over other keys, Dv contiguous; null: none
  const float* other_lse;      // [B, Hq, T], natural log; null: none
  Strides3 other_out_strides;  // elements
  Strides3 other_lse_strides;  // elements
  ValidTokens tokens;          // of the T = tokens.seq_len new tokens
  const void* key_rows;        // [C, Dk], 16-byte aligned
  const void* value_rows;      // [C, Dv], 16-byte aligned
  RaggedRows rows;             // R = B * rows_per_sequence
  void* out;                   // [R * g, T, Dv] = [B, Hq, T, Dv], 16-byte aligned
  float* lse;                  // [R * g, T] = [B, Hq, T], natural log
  int32_t rows_per_sequence;   // Hq / g
  int32_t rows_per_kv_head;    // rows_per_sequence / Hkv: rows that share a new key head
  int32_t group_size;          // g, 1 to 16; T * g below 2^31
  int32_t key_dim, value_dim;  // channels, multiples of 8 up to 256
  float scale;                 // factor of the logits
  DType dtype;                 // of all but lse
};

/// Bytes of workspace that ragged_attention needs on the current device, 16-byte aligned; contents do not matter.
cudaError_t ragged_attention_workspace_bytes(const RaggedAttentionParams& params, int64_t* bytes);

cudaError_t ragged_attention(const RaggedAttentionParams& params, void* workspace, cudaStream_t stream);

}  // namespace uncomp::kernels
