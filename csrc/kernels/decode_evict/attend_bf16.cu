// SPDX-License-Identifier: Apache-2.0
// Launch 1 of a step for bf16 rows.
#include "kernels/decode_evict/attend.cuh"

namespace uncomp::kernels {

cudaError_t evict_attend_bf16(const DecodeEvictParams& params, const EvictPlan& plan, const DecodeEvictWorkspace& work,
                              cudaStream_t stream) {
  return launch_attend_half<__nv_bfloat16>(params, plan, work, stream);
}

}  // namespace uncomp::kernels
