// SPDX-License-Identifier: Apache-2.0
// ragged_attention for fp16 rows on sm_90a.
#include "kernels/ragged_attention/warpgroups.cuh"

namespace uncomp::kernels {

cudaError_t launch_warpgroups_fp16(const RaggedAttentionParams& params, const WarpgroupPlan& plan,
                                   const RaggedMaps& maps, cudaStream_t stream) {
  return launch_warpgroups<__half>(params, plan, maps, stream);
}

}  // namespace uncomp::kernels
