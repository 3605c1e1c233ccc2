// SPDX-License-Identifier: Apache-2.0
// Launch 1 of a step for fp32 rows: one tile for every head dim and group size, because it has no speed target.
#include "kernels/decode_attention/slice_fp32.cuh"
#include "kernels/decode_evict/attend.cuh"

namespace uncomp::kernels {

cudaError_t evict_attend_fp32(const DecodeEvictParams& params, const EvictPlan& plan, const DecodeEvictWorkspace& work,
                              cudaStream_t stream) {
  return launch_attend<float, kMaxHeadDim, kMaxGroupSize>(params, plan, work, stream);
}

}  // namespace uncomp::kernels
