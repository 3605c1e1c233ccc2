// SPDX-License-Identifier: Apache-2.0
// The split kernel for fp32 latents: one tile for all widths, because it has no speed target.
#include "kernels/decode_attention/latent_fp32.cuh"
#include "kernels/decode_attention/latent_split.cuh"

namespace uncomp::kernels {

cudaError_t launch_latents_fp32(const DecodeAttentionParams& params, const KeyTransformParams& transform,
                                const DecodeWorkspace& work, cudaStream_t stream) {
  return launch_latent_split<float, LatentBlock<float, LatentShapeFp32>>(params, transform, work, stream);
}

}  // namespace uncomp::kernels
