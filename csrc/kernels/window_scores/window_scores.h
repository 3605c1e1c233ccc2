// SPDX-License-Identifier: Apache-2.0
// Kernel floor of window_scores: lse of the window queries, then the mass they put on every key.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/window.h"

namespace uncomp::kernels {

struct WindowScoresParams {
  const void* query;      // [B, Hq, W, D]       rotated
  const void* key;        // [B, Hkv, S, D] or [C, D]
  const void* value;      // [B, Hkv, S, Dv] or [C, Dv], or null
  TokenRows rows;         // where a row's tokens lie
  Strides3 query_stride;  // elements; token = window query
  Strides3 key_stride;    // elements; an arena uses token alone
  Strides3 value_stride;  // elements
  float* scores;          // [R, width], or [B * Hq, width] with Reduce::none
  float* lse;             // [B, Hq, W]          natural log
  int32_t batch, num_q_heads, window, head_dim, value_dim;
  int32_t num_rows;    // R
  int32_t group_size;  // query heads of a row
  int32_t width;       // columns of scores
  float scale;         // factor of the logits
  Reduce reduce_window, reduce_group;
  DType dtype;
};

/// Bytes of workspace that window_scores wants for these sizes on the current device.
cudaError_t window_scores_workspace_bytes(const WindowScoresParams& params, size_t* bytes);

/// Writes all of scores and lse. `workspace` needs 8-byte alignment and no initial value.
cudaError_t window_scores(const WindowScoresParams& params, void* workspace, cudaStream_t stream);

}  // namespace uncomp::kernels
