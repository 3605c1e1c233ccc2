// SPDX-License-Identifier: Apache-2.0
// Kernel floor of seed_votes_: fixed-point votes of the last prompt queries on the slots of a packed arena.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/window.h"

namespace uncomp::kernels {

struct SeedVotesParams {
  const void* query;              // [B, Hq, W, D]   rotated
  const float* lse;               // [B, Hq, W]      natural log
  const int32_t* query_position;  // [B, W]          tokens, -1 for none
  const void* key;                // [C, D]
  const int32_t* slot_position;   // [C]             tokens
  TokenRows rows;                 // an arena
  Strides3 query_stride;          // elements; token = window query
  int64_t key_stride;             // elements from slot to slot
  int32_t* votes;                 // [Wd, C]
  int32_t* vote_sum;              // [C]
  int32_t* vote_step;             // [R]
  int32_t* order;                 // [C]
  int32_t num_q_heads, window, vote_window, head_dim;
  int32_t num_rows;     // R
  int32_t group_size;   // query heads of a row
  float scale;          // factor of the logits
  Reduce reduce_group;  // mean or max
  DType dtype;
};

cudaError_t seed_votes(const SeedVotesParams& params, cudaStream_t stream);

}  // namespace uncomp::kernels
