// SPDX-License-Identifier: Apache-2.0
// A block finds a worker's share of all rows (core/splits.h) from the device's lengths.
#pragma once

#include "core/splits.h"
#include "kernels/common/reduce.cuh"

namespace uncomp::kernels {

/// A worker's share: quota, length of the line of blocks, and the row that owns its first block; the cursor is not set
/// when that block is beyond the line. The same numbers in every block, because they depend on the lengths only.
struct WorkerShare {
  int64_t quota, total;
  RowCursor cursor;
};

/// Called by all threads of a block of kWarps warps. Blocks are counted in 32 bits: `row_start` is int32. Each warp
/// sums up a segment of the rows, 32 neighbours at a time; the warp whose segment holds the first block looks for it.
template <int kWarps>
__device__ __forceinline__ WorkerShare find_share(const RaggedRows& rows, int32_t worker, int32_t workers,
                                                  int32_t lead = 0) {
  constexpr int kAtOnce = 8;  // rows of a lane, loaded together
  __shared__ int32_t warp_blocks[kWarps];
  __shared__ RowCursor found;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const RowSegment segment = row_segment(rows.num_rows, warp, kWarps);
  const auto blocks_of = [&](int32_t row) {
    return row < segment.end ? static_cast<int32_t>(split_blocks(rows.len(row), lead)) : 0;
  };
  int32_t mine = 0;
  for (int32_t first = segment.begin + lane; first < segment.end; first += 32 * kAtOnce) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) mine += blocks_of(first + 32 * u);
  }
  const int32_t of_warp = warp_sum(mine);
  if (lane == 0) warp_blocks[warp] = of_warp;
  __syncthreads();
  int32_t before = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_blocks[w];
    total += warp_blocks[w];
  }
  WorkerShare share{split_quota(total, workers), total, {}};
  const int64_t block = worker * share.quota;
  if (block >= before && block < before + of_warp) {
    for (int32_t first = segment.begin; first < segment.end; first += 32) {
      const int32_t blocks = blocks_of(first + lane);
      int32_t upto = blocks;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int32_t other = __shfl_up_sync(kFullWarp, upto, offset);
        if (lane >= offset) upto += other;
      }
      const int32_t start = before + upto - blocks;
      const bool owner = block >= start && block < start + blocks;
      if (owner) found = {first + lane, start};
      if (__any_sync(kFullWarp, owner)) break;
      before += __shfl_sync(kFullWarp, upto, 31);
    }
  }
  __syncthreads();
  if (block < share.total) share.cursor = found;
  return share;
}

}  // namespace uncomp::kernels
