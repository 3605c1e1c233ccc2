// SPDX-License-Identifier: Apache-2.0
// The split kernel for fp32 rows: one tile for every head dim and group size, because it has no speed target.
#include "kernels/decode_attention/slice_fp32.cuh"
#include "kernels/decode_attention/split.cuh"

namespace uncomp::kernels {

cudaError_t launch_split_fp32(const DecodeAttentionParams& params, const DecodeWorkspace& work, cudaStream_t stream) {
  return launch_split<float, kMaxHeadDim, kMaxGroupSize>(params, work, stream);
}

}  // namespace uncomp::kernels
