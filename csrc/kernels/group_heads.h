// SPDX-License-Identifier: Apache-2.0
// Kernel floor of group_heads: ranks by counting, then a closed form from rank to group.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace uncomp::kernels {

struct GroupHeadsParams {
  const float* entropy;  // [N, H], rows contiguous
  int32_t* group;        // [N, H], contiguous
  int32_t* rank;         // [N, H], contiguous
  int64_t row_stride;    // elements between rankings of entropy
  int32_t count, rows;   // N, H
  int32_t num_groups;    // 1 .. H
  bool reverse;          // turns the group ids round
};

cudaError_t group_heads(const GroupHeadsParams& params, cudaStream_t stream);

}  // namespace uncomp::kernels
