// SPDX-License-Identifier: Apache-2.0
// The split kernel for fp16 rows.
#include "kernels/decode_attention/split.cuh"

namespace uncomp::kernels {

cudaError_t launch_split_fp16(const DecodeAttentionParams& params, const DecodeWorkspace& work, cudaStream_t stream) {
  return launch_split_half<__half>(params, work, stream);
}

cudaError_t launch_clusters_fp16(const DecodeAttentionParams& params, int32_t ranks, cudaStream_t stream,
                                 bool* launched) {
  return launch_clusters_half<__half>(params, ranks, stream, launched);
}

}  // namespace uncomp::kernels
