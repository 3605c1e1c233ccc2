// SPDX-License-Identifier: Apache-2.0
// Kernel floor of gather_tokens: rows of several tensors by one index in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/constants.h"

namespace uncomp::kernels {

struct GatherTokensParams {
  struct Source {
    const char* from;         // [B or 1, S, token_bytes]
    char* to;                 // [B, N, token_bytes], contiguous
    int64_t sequence_stride;  // bytes; 0 shares one sequence
    int64_t token_stride;     // bytes
    int32_t token_bytes;      // bytes
    int32_t lane_bytes;       // 16, 8, 4, 2 or 1: widest access that every row of source and target allows
    int32_t first_piece;      // first block column of this tensor, filled by gather_tokens()
  };
  Source source[kMaxGatherTensors];
  const int32_t* index;  // [B, N] tokens, -1 for zeros
  int32_t num_tensors, batch, num_wanted, seq_len;
};

cudaError_t gather_tokens(GatherTokensParams params, cudaStream_t stream);

}  // namespace uncomp::kernels
