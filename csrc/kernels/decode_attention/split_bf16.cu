// SPDX-License-Identifier: Apache-2.0
// The split kernel for bf16 rows.
#include "kernels/decode_attention/split.cuh"

namespace uncomp::kernels {

cudaError_t launch_split_bf16(const DecodeAttentionParams& params, const DecodeWorkspace& work, cudaStream_t stream) {
  return launch_split_half<__nv_bfloat16>(params, work, stream);
}

cudaError_t launch_clusters_bf16(const DecodeAttentionParams& params, int32_t ranks, cudaStream_t stream,
                                 bool* launched) {
  return launch_clusters_half<__nv_bfloat16>(params, ranks, stream, launched);
}

}  // namespace uncomp::kernels
