// SPDX-License-Identifier: Apache-2.0
// ragged_attention for fp16 rows.
#include "kernels/ragged_attention/tiles.cuh"

namespace uncomp::kernels {

cudaError_t launch_ragged_fp16(const RaggedAttentionParams& params, const RaggedWorkspace& work, cudaStream_t stream) {
  return launch_ragged_half<__half>(params, work, stream);
}

}  // namespace uncomp::kernels
