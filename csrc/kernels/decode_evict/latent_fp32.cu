// SPDX-License-Identifier: Apache-2.0
// Launch 1 of a step for fp32 latents: one tile for all widths, because it has no speed target.
#include "kernels/decode_attention/latent_fp32.cuh"
#include "kernels/decode_evict/attend_latents.cuh"

namespace uncomp::kernels {

cudaError_t evict_latents_fp32(const DecodeEvictParams& params, const KeyTransformParams& transform,
                               const EvictPlan& plan, const DecodeEvictWorkspace& work, cudaStream_t stream) {
  return launch_evict_latents<float, LatentShapeFp32>(params, transform, plan, work, stream);
}

}  // namespace uncomp::kernels
