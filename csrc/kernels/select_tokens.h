// SPDX-License-Identifier: Apache-2.0
// Kernel floor of select_tokens: radix selection of each row's threshold, then ordered compaction.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"

namespace uncomp::kernels {

struct SelectTokensParams {
  const float* scores;      // [R, S], columns contiguous
  const int32_t* length;    // [R] tokens
  const int32_t* keep_len;  // [R] tokens
  int32_t* index;           // [total_keep]
  int32_t* row_start;       // [R + 1] entries of index
  int64_t row_stride;       // elements between rows of scores
  int32_t num_rows;         // R
  int32_t columns;          // S, at most kMaxSelectColumns
  int32_t total_keep;       // entries
  int32_t sink, window;     // tokens, 0 .. S
  int32_t pool;             // odd
  Pool pool_mode;
};

/// Bytes of workspace that the launch on the current device needs; often 0.
cudaError_t select_tokens_workspace_bytes(const SelectTokensParams& params, int64_t* bytes);

cudaError_t select_tokens(const SelectTokensParams& params, void* workspace, cudaStream_t stream);

}  // namespace uncomp::kernels
