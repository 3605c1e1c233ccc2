// SPDX-License-Identifier: Apache-2.0
// A thread owns one row and counts the rows that stand before it; a block passes its ranking tile by tile.
#include "kernels/group_heads.h"

#include "core/budget.h"
#include "core/select_keys.h"

namespace uncomp::kernels {
namespace {

constexpr int kTile = 256;

__global__ void __launch_bounds__(kTile) group_heads_kernel(const __grid_constant__ GroupHeadsParams p, int32_t tiles) {
  __shared__ uint32_t keys[kTile];
  const int32_t n = blockIdx.x / tiles, tile = blockDim.x;
  const int32_t row = static_cast<int32_t>(blockIdx.x % tiles) * tile + threadIdx.x;
  const float* entropy = p.entropy + n * p.row_stride;
  const uint32_t own = row < p.rows ? rank_key(entropy[row]) : 0u;
  int32_t before = 0;
  for (int32_t base = 0; base < p.rows; base += tile) {
    const int32_t held = min_of(tile, p.rows - base);
    __syncthreads();
    if (threadIdx.x < held) keys[threadIdx.x] = rank_key(entropy[base + threadIdx.x]);
    __syncthreads();
    for (int32_t i = 0; i < held; ++i) before += keys[i] < own || (keys[i] == own && base + i < row);
  }
  if (row >= p.rows) return;
  const int64_t at = static_cast<int64_t>(n) * p.rows + row;
  const int32_t group = GroupSizes(p.rows, p.num_groups).group_of(before);
  p.rank[at] = before;
  p.group[at] = p.reverse ? p.num_groups - 1 - group : group;
}

}  // namespace

cudaError_t group_heads(const GroupHeadsParams& params, cudaStream_t stream) {
  if (params.count == 0 || params.rows == 0) return cudaSuccess;
  const int32_t threads = min_of(kTile, round_up(min_of(params.rows, kTile), 32));
  const int64_t tiles = ceil_div<int64_t>(params.rows, threads), blocks = tiles * params.count;
  if (!fits<int32_t>(blocks)) return cudaErrorInvalidConfiguration;
  group_heads_kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(params, static_cast<int32_t>(tiles));
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
