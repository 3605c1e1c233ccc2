// SPDX-License-Identifier: Apache-2.0
// The blocks of a row, their histograms, and the digit of the last token that stays.
#pragma once

#include "core/select_plan.h"
#include "kernels/common/cluster.cuh"
#include "kernels/common/reduce.cuh"

namespace uncomp::kernels::select_steps {

/// Blocks of the row this block works on.
struct Team {
  int32_t rank, blocks;

  __device__ __forceinline__ void barrier() const {
    if (blocks > 1) {
      cluster_barrier();
    } else {
      __syncthreads();
    }
  }
};

static_assert(kSelectMaxBlocks == 8, "a lane reads all blocks at once");

/// Sum of a word of shared memory over the blocks; all reads are in flight together.
__device__ __forceinline__ uint32_t sum_over(const Team& team, const uint32_t* p) {
  if (team.blocks == 1) return *p;
  uint32_t part[kSelectMaxBlocks];
  // A block that does not exist is read as one that does, and not counted: `blocks` is a power of two.
#pragma unroll
  for (int32_t r = 0; r < kSelectMaxBlocks; ++r) part[r] = cluster_read(p, r & (team.blocks - 1));
  uint32_t total = part[0] + part[1];
  if (team.blocks > 2) total += part[2] + part[3];
  if (team.blocks > 4) total += part[4] + part[5] + (part[6] + part[7]);
  return total;
}

__device__ __forceinline__ uint4 sum_over(const Team& team, const uint4* p) {
  if (team.blocks == 1) return *p;
  uint4 part[kSelectMaxBlocks], total{};
#pragma unroll
  for (int32_t r = 0; r < kSelectMaxBlocks; ++r) part[r] = cluster_read4(p, r & (team.blocks - 1));
#pragma unroll
  for (int32_t r = 0; r < kSelectMaxBlocks; ++r) {
    if (r >= team.blocks) break;
    total.x += part[r].x;
    total.y += part[r].y;
    total.z += part[r].z;
    total.w += part[r].w;
  }
  return total;
}

/// Sum over this lane and the lanes before it.
__device__ __forceinline__ uint32_t sum_upto(uint32_t x, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, x, offset);
    if (lane >= offset) x += other;
  }
  return x;
}

struct Digit {
  uint32_t value, above, inside;  // the digit of the last token that stays; keys with a larger digit, with this one
};

/// Counts of a digit: sums of groups of neighbouring bins, then the bins.
template <int kBits>
struct Histogram {
  static constexpr int kBins = 1 << kBits, kGroups = kBins / kSelectGroup, kOfLane = kGroups / 32;
  static_assert(kOfLane == 1 || kOfLane == 4);
  uint32_t* group;

  __device__ uint32_t* bin() const { return group + kGroups; }
  __device__ void clear() const {
    uint4* bins = reinterpret_cast<uint4*>(bin());
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < kBins / 4; i += blockDim.x) bins[i] = uint4{};
  }
  /// The digit in which the `need`-th largest key lies, into `found`; `need` is at most the number of keys counted.
  /// Called by whole blocks. `meanwhile()` runs in the last warp while the first one searches.
  template <class Meanwhile>
  __device__ __forceinline__ void find(const Team& team, uint32_t need, Digit& found,
                                       const Meanwhile& meanwhile) const {
    const int lane = threadIdx.x % 32;
    __syncthreads();
    const uint4* bins = reinterpret_cast<const uint4*>(bin());
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < kBins / 4; i += blockDim.x) {
      const uint4 x = bins[i];
      uint32_t sum = x.x + x.y + (x.z + x.w);
#pragma unroll
      for (int offset = 1; offset < kSelectGroup / 4; offset *= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
      if (lane % (kSelectGroup / 4) == 0) group[i / (kSelectGroup / 4)] = sum;
    }
    team.barrier();
    if (threadIdx.x < 32) {
      // Lane 0 has the highest groups.
      uint32_t held[kOfLane], sum = 0;
      if constexpr (kOfLane == 1) {
        held[0] = sum = sum_over(team, group + (31 - lane));
      } else {
        const uint4 g = sum_over(team, reinterpret_cast<const uint4*>(group) + (31 - lane));
        held[0] = g.w;
        held[1] = g.z;
        held[2] = g.y;
        held[3] = g.x;
        sum = g.x + g.y + (g.z + g.w);
      }
      const uint32_t upto = sum_upto(sum, lane);
      uint32_t before = upto - sum, at = (31 - lane) * kOfLane + kOfLane - 1;
#pragma unroll
      for (int i = 0; i + 1 < kOfLane; ++i) {
        if (before + held[i] >= need) break;
        before += held[i];
        --at;
      }
      const int owner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, upto >= need))) - 1;
      at = __shfl_sync(kFullWarp, at, owner);
      before = __shfl_sync(kFullWarp, before, owner);
      // Its bins, highest first.
      const uint32_t mine = at * kSelectGroup + (31 - lane), count = sum_over(team, bin() + mine);
      const uint32_t through = before + sum_upto(count, lane);
      if (through >= need && through - count < need) found = {mine, through - count, count};
    } else if (threadIdx.x >= blockDim.x - 32) {
      meanwhile();
    }
    __syncthreads();
  }
};

}  // namespace uncomp::kernels::select_steps
