// SPDX-License-Identifier: Apache-2.0
// What the launches of one step hand to each other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/eviction.h"
#include "kernels/decode_evict/decode_evict.h"

namespace uncomp::kernels {

/// Logits are kept times log2(e), so that weights are powers of two.
struct DecodeEvictWorkspace {
  float* logits;      // [g, C]         of the live slots; one launch: only of ranks whose share does not fit on chip
  float* new_logit;   // [R, g]         of the new token
  float* largest;     // [R, P, g]      of a slice; P = plan.most_slices
  float* total;       // [R, P, g]      sum of 2^(logit - largest)
  float* partial;     // [R, P, g, Dv]  sum of 2^(logit - largest) * value
  int32_t* new_vote;  // [R]
};

/// What a step does with row `row`; every launch of the step sees the same.
UNCOMP_HD inline EvictStep step_of(const DecodeEvictParams& p, int32_t row) {
  const RaggedRows rows = p.ragged();
  return evict_step(rows.len(row), rows.room(row), p.window, p.sink);
}

/// One function of each per dtype, in a file of its own.
/// attend: launch 1 of several: logits, and per slice largest, total and partial.
cudaError_t evict_attend_fp32(const DecodeEvictParams&, const EvictPlan&, const DecodeEvictWorkspace&, cudaStream_t);
cudaError_t evict_attend_fp16(const DecodeEvictParams&, const EvictPlan&, const DecodeEvictWorkspace&, cudaStream_t);
cudaError_t evict_attend_bf16(const DecodeEvictParams&, const EvictPlan&, const DecodeEvictWorkspace&, cudaStream_t);

/// latents: the same over latents.
cudaError_t evict_latents_fp32(const DecodeEvictParams&, const KeyTransformParams&, const EvictPlan&,
                               const DecodeEvictWorkspace&, cudaStream_t);
cudaError_t evict_latents_fp16(const DecodeEvictParams&, const KeyTransformParams&, const EvictPlan&,
                               const DecodeEvictWorkspace&, cudaStream_t);
cudaError_t evict_latents_bf16(const DecodeEvictParams&, const KeyTransformParams&, const EvictPlan&,
                               const DecodeEvictWorkspace&, cudaStream_t);

/// rows: the whole step in one launch, if the device can and it pays; `launched` tells. `logits` is the workspace's.
cudaError_t evict_rows_fp16(const DecodeEvictParams&, float* logits, cudaStream_t, bool* launched);
cudaError_t evict_rows_bf16(const DecodeEvictParams&, float* logits, cudaStream_t, bool* launched);

}  // namespace uncomp::kernels
