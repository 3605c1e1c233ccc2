// SPDX-License-Identifier: Apache-2.0
// What the eigenvalue kernels share: the trace and its degenerate values, and a sum over neighbouring threads.
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
  // A vote tells the compiler that the warp stays together.
  if (__all_sync(kFullWarp, trace > 0.0f && trace < INFINITY)) return false;
  const float value = trace == 0.0f ? 0.0f : NAN;
  for (int r = threadIdx.x; r < top; r += blockDim.x) out[r] = value;
  return true;
}

/// Sum over kLanes neighbouring threads, the same in all of them.
template <int kLanes>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

/// Which of the sums of `sum_rows` thread `t` gets.
template <int kLanes, int kCount>
__device__ __forceinline__ int summed_row(int t) {
  return t / (kLanes / kCount);
}

/// Adds y[0 .. kCount - 1] over kLanes neighbouring threads, of which this is number `t`. While several sums are left,
/// a thread gives half of them away and keeps the other; then whole sums are added. Returns the sum of row
/// summed_row(t), the same in the threads that share it.
template <int kLanes, int kCount>
__device__ __forceinline__ float sum_rows(float (&y)[kCount], int t) {
  static_assert(kCount <= kLanes);
  int distance = kLanes / 2;
#pragma unroll
  for (int left = kCount / 2; left > 0; left /= 2, distance /= 2) {
    const bool upper = (t & distance) != 0;
#pragma unroll
    for (int q = 0; q < left; ++q) {
      const float give = upper ? y[q] : y[q + left];
      const float keep = upper ? y[q + left] : y[q];
      y[q] = keep + __shfl_xor_sync(kFullWarp, give, distance);
    }
  }
#pragma unroll
  for (; distance > 0; distance /= 2) y[0] += __shfl_xor_sync(kFullWarp, y[0], distance);
  return y[0];
}

}  // namespace uncomp::kernels
