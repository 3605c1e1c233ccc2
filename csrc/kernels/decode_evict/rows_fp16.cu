// SPDX-License-Identifier: Apache-2.0
// The one-launch step for fp16 rows.
#include "kernels/decode_evict/row_kernel.cuh"

namespace uncomp::kernels {

cudaError_t evict_rows_fp16(const DecodeEvictParams& params, float* logits, cudaStream_t stream, bool* launched) {
  return launch_rows_half<__half>(params, logits, stream, launched);
}

}  // namespace uncomp::kernels
