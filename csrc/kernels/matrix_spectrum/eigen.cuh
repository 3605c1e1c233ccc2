// SPDX-License-Identifier: Apache-2.0
// What both eigenvalue kernels share: the trace and its degenerate values, and a sum over 16 neighbouring threads.
#pragma once

#include <cmath>

#include "kernels/common/reduce.cuh"
#include "kernels/matrix_spectrum.h"

namespace uncomp::kernels {

/// Trace of `source` [kTile, kTile]; every warp computes it alike.
template <int kTile>
__device__ __forceinline__ float warp_trace(const float* source, int n) {
  float sum = 0.0f;
  for (int i = threadIdx.x % 32; i < n; i += 32) sum += source[i * (kTile + 1)];
  return warp_sum(sum);
}

/// No token left gives zeros, NaN or Inf gives NaN; true when the block is done.
__device__ __forceinline__ bool write_degenerate(float trace, int top, float* out) {
  if (trace > 0.0f && trace < INFINITY) return false;
  const float value = trace == 0.0f ? 0.0f : NAN;
  for (int r = threadIdx.x; r < top; r += blockDim.x) out[r] = value;
  return true;
}

/// Adds y[0 .. kCount - 1] over 16 neighbouring threads, of which this is number `t`. While several sums are left, a
/// thread gives half of them away and keeps the other; then whole sums are added. Returns the sum of row *row, the same
/// in the 16 / kCount threads that share it.
template <int kCount>
__device__ __forceinline__ float sum_rows(float (&y)[kCount], int t, int* row) {
  static_assert(kCount == 4 || kCount == 8);
  *row = 0;
  int distance = 8;
#pragma unroll
  for (int left = kCount / 2; left > 0; left /= 2, distance /= 2) {
    const bool upper = (t & distance) != 0;
#pragma unroll
    for (int q = 0; q < left; ++q) {
      const float give = upper ? y[q] : y[q + left];
      const float keep = upper ? y[q + left] : y[q];
      y[q] = keep + __shfl_xor_sync(kFullWarp, give, distance);
    }
    if (upper) *row += left;
  }
#pragma unroll
  for (; distance > 0; distance /= 2) y[0] += __shfl_xor_sync(kFullWarp, y[0], distance);
  return y[0];
}

/// The kernel for dims 129 to 256.
cudaError_t large_eigenvalues(const MatrixSpectrumParams& params, const float* gram, cudaStream_t stream);

}  // namespace uncomp::kernels
