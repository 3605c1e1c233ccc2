// SPDX-License-Identifier: Apache-2.0
// The one-launch step for bf16 rows.
#include "kernels/decode_evict/row_kernel.cuh"

namespace uncomp::kernels {

cudaError_t evict_rows_bf16(const DecodeEvictParams& params, float* logits, cudaStream_t stream, bool* launched) {
  return launch_rows_half<__nv_bfloat16>(params, logits, stream, launched);
}

}  // namespace uncomp::kernels
