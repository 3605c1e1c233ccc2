// SPDX-License-Identifier: Apache-2.0
// Kernel floor of decode_attention: one query token over ragged rows, balanced over the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/ragged.h"
#include "kernels/decode_attention/key_transform.h"

namespace uncomp::kernels {

struct DecodeAttentionParams {
  const void* query;           // [B, Hq, 1, Dk], Dk contiguous
  int64_t query_batch_stride;  // elements
  int64_t query_head_stride;   // elements
  const void* key_rows;        // [C, Dk], 16-byte aligned
  const void* value_rows;      // [C, Dv], 16-byte aligned
  RaggedRows rows;             // R = B * rows_per_sequence
  void* out;                   // [R * g, Dv] = [B, Hq, 1, Dv]
  float* lse;                  // [R * g] = [B, Hq], natural log
  int32_t rows_per_sequence;   // Hq / g
  int32_t group_size;          // g, 1 to 16
  int32_t key_dim, value_dim;  // channels, multiples of 8 up to 256
  float scale;                 // factor of the logits
  DType dtype;                 // of query, rows and out
};

/// Bytes of workspace that decode_attention needs on the current device, 16-byte aligned; contents do not matter.
cudaError_t decode_attention_workspace_bytes(const DecodeAttentionParams& params, int64_t* bytes,
                                             const KeyTransformParams* transform = nullptr);

/// With `transform`, key_rows holds latents [C, key_dim] of at most 128 numbers, and the query has transform->dim
/// channels; both are multiples of 16.
cudaError_t decode_attention(const DecodeAttentionParams& params, void* workspace, cudaStream_t stream,
                             const KeyTransformParams* transform = nullptr);

}  // namespace uncomp::kernels
