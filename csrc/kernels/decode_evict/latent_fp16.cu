// SPDX-License-Identifier: Apache-2.0
// Launch 1 of a step for fp16 latents.
#include "kernels/decode_attention/latent_launch.cuh"
#include "kernels/decode_evict/attend_latents.cuh"

namespace uncomp::kernels {

cudaError_t evict_latents_fp16(const DecodeEvictParams& params, const KeyTransformParams& transform,
                               const EvictPlan& plan, const DecodeEvictWorkspace& work, cudaStream_t stream) {
  const LatentTile tile = latent_tile(params.key_dim, params.value_dim, params.group_size);
  return with_latent_shape(tile, [&]<class Shape>(Shape) {
    return launch_evict_latents<__half, Shape>(params, transform, plan, work, stream);
  });
}

}  // namespace uncomp::kernels
