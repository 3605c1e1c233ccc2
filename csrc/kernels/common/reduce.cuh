// SPDX-License-Identifier: Apache-2.0
// Sums and maxima over a warp and over a block, in an order that depends on nothing but the thread index.
#pragma once

#include <cstdint>

namespace uncomp::kernels {

inline constexpr unsigned kFullWarp = 0xffffffffu;

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

template <class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const T other = __shfl_xor_sync(kFullWarp, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

/// Sum over the block, returned to every thread. `scratch` holds one T per warp; the block must be whole warps.
/// Barriers inside: call under block-uniform conditions.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  T total = T(0);
  for (int w = 0; w < warps; ++w) total += scratch[w];
  return total;
}

/// Sum over the threads before this one, in thread order; `total` gets the sum over the block. `scratch` holds one T
/// per warp; the block must be whole warps. Barriers inside: call under block-uniform conditions.
template <class T>
__device__ __forceinline__ T block_exclusive_sum(T x, T* scratch, T* total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  T upto = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const T other = __shfl_up_sync(kFullWarp, upto, offset);
    if (lane >= offset) upto += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = upto;
  __syncthreads();
  const T of_warp = lane < warps ? scratch[lane] : T(0);
  *total = warp_sum(of_warp);
  return warp_sum(lane < warp ? of_warp : T(0)) + upto - x;
}

}  // namespace uncomp::kernels
