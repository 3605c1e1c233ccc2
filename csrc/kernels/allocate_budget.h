// SPDX-License-Identifier: Apache-2.0
// Kernel floor of allocate_budget: one block solves one sequence in exact integers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace uncomp::kernels {

struct AllocateBudgetParams {
  const int32_t* group;   // [N, H]
  const int32_t* weight;  // [G] or [N, G]
  const int32_t* length;  // [N] tokens
  const int32_t* total;   // [N] tokens
  int32_t* limit;         // [N, H] tokens
  int64_t weight_stride;  // entries between sequences: 0 or G
  int32_t count, rows;    // N, H; at most kMaxBudgetRows rows
  int32_t num_groups;     // G, 1 .. kMaxBudgetRows
  int32_t floor;          // tokens
};

cudaError_t allocate_budget(const AllocateBudgetParams& params, cudaStream_t stream);

}  // namespace uncomp::kernels
