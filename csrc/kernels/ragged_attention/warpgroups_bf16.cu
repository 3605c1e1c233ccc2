// SPDX-License-Identifier: Apache-2.0
// ragged_attention for bf16 rows on sm_90a.
#include "kernels/ragged_attention/warpgroups.cuh"

namespace uncomp::kernels {

cudaError_t launch_warpgroups_bf16(const RaggedAttentionParams& params, const WarpgroupPlan& plan,
                                   const RaggedMaps& maps, cudaStream_t stream) {
  return launch_warpgroups<__nv_bfloat16>(params, plan, maps, stream);
}

}  // namespace uncomp::kernels
