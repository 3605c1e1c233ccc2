// SPDX-License-Identifier: Apache-2.0
// Launch 1 of a step for fp16 rows.
#include "kernels/decode_evict/attend.cuh"

namespace uncomp::kernels {

cudaError_t evict_attend_fp16(const DecodeEvictParams& params, const EvictPlan& plan, const DecodeEvictWorkspace& work,
                              cudaStream_t stream) {
  return launch_attend_half<__half>(params, plan, work, stream);
}

}  // namespace uncomp::kernels
