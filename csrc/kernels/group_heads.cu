// SPDX-License-Identifier: Apache-2.0
// Eight neighbouring threads share a row and count the rows that stand before it; a block passes its ranking tile by
// tile.
#include "kernels/group_heads.h"

#include "core/budget.h"
#include "core/select_keys.h"
#include "kernels/common/reduce.cuh"

namespace uncomp::kernels {
namespace {

constexpr int kParts = 8, kRows = 32, kThreads = kParts * kRows;
constexpr int kTile = 4 * kThreads;  // keys in shared memory
constexpr uint32_t kNever = 0xffffffffu;

/// Rank key below kNever, so that key + 1 is one too: NaN moves down into the gap above infinity.
__device__ __forceinline__ uint32_t small_key(float x) { return min_of(rank_key(x), kNever - 1); }

__global__ void __launch_bounds__(kThreads)
    group_heads_kernel(const __grid_constant__ GroupHeadsParams p, int32_t tiles) {
  __shared__ alignas(16) uint32_t keys[kTile];
  const int32_t n = blockIdx.x / tiles, part = threadIdx.x % kParts;
  const int32_t row = static_cast<int32_t>(blockIdx.x % tiles) * kRows + threadIdx.x / kParts;
  const float* entropy = p.entropy + n * p.row_stride;
  const uint32_t own = row < p.rows ? small_key(entropy[row]) : 0u;
  int32_t before = 0;
  for (int32_t base = 0; base < p.rows; base += kTile) {
    const int32_t held = min_of(kTile, round_up(p.rows - base, 4 * kParts));
    if (base > 0) __syncthreads();
    for (int32_t i = threadIdx.x; i < held; i += kThreads) {
      keys[i] = base + i < p.rows ? small_key(entropy[base + i]) : kNever;
    }
    __syncthreads();
#pragma unroll 4
    for (int32_t i = 4 * part; i < held; i += 4 * kParts) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + i);
      const int32_t ahead = row - base - i;  // equal keys count when they stand before the row
      before += four.x < own + (ahead > 0 ? 1u : 0u);
      before += four.y < own + (ahead > 1 ? 1u : 0u);
      before += four.z < own + (ahead > 2 ? 1u : 0u);
      before += four.w < own + (ahead > 3 ? 1u : 0u);
    }
  }
#pragma unroll
  for (int distance = 1; distance < kParts; distance *= 2) before += __shfl_xor_sync(kFullWarp, before, distance);
  if (row >= p.rows || part > 1) return;
  const int64_t at = static_cast<int64_t>(n) * p.rows + row;
  if (part == 0) {
    p.rank[at] = before;
  } else {
    const int32_t group = GroupSizes(p.rows, p.num_groups).group_of(before);
    p.group[at] = p.reverse ? p.num_groups - 1 - group : group;
  }
}

}  // namespace

cudaError_t group_heads(const GroupHeadsParams& params, cudaStream_t stream) {
  if (params.count == 0 || params.rows == 0) return cudaSuccess;
  const int64_t tiles = ceil_div<int64_t>(params.rows, kRows), blocks = tiles * params.count;
  if (!fits<int32_t>(blocks)) return cudaErrorInvalidConfiguration;
  group_heads_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params, static_cast<int32_t>(tiles));
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
