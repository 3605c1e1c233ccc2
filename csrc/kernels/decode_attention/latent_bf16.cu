// SPDX-License-Identifier: Apache-2.0
// The split kernel for bf16 latents.
#include "kernels/decode_attention/latent_split.cuh"

namespace uncomp::kernels {

cudaError_t launch_latents_bf16(const DecodeAttentionParams& params, const KeyTransformParams& transform,
                                const DecodeWorkspace& work, cudaStream_t stream) {
  return launch_half_latents<__nv_bfloat16>(params, transform, work, stream);
}

}  // namespace uncomp::kernels
