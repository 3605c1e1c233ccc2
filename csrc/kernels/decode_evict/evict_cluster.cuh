// SPDX-License-Identifier: Apache-2.0
// The end of a step on few long rows (sm_90): the blocks of a cluster find out together who leaves a row. All votes are
// in global memory.
#pragma once

#include "kernels/common/cluster.cuh"
#include "kernels/decode_evict/evict.cuh"

namespace uncomp::kernels {

/// The first to leave among a block's places, told to the cluster.
struct alignas(16) ToldLeaver {
  uint32_t score_low, score_high, place, slot;
};

struct EvictClusterShared {
  EvictShared evict;
  ToldLeaver told;
};

/// Steps 3 to 5 of the contract by `ranks` <= 32 blocks, of which this is number `rank`. Block-uniform arguments.
__device__ __forceinline__ void evict_row_together(const DecodeEvictParams& params, const DecodeEvictWorkspace& work,
                                                   int32_t row, int32_t rank, int32_t ranks,
                                                   EvictClusterShared& shared) {
  const EvictStep step = step_of(params, row);
  if (step.kind != EvictStep::Kind::evict) {
    // Every rank has read the length before rank 0 changes it: a late one would take a row that has just become full
    // for one to evict from.
    cluster_barrier();
    if (rank == 0) evict_row(params, work, row, step, shared.evict);
    return;
  }
  const int64_t start = params.ragged().start(row);
  int32_t* order = params.order + start;
  const int32_t begin = static_cast<int32_t>(int64_t{step.len} * rank / ranks);
  const int32_t end = static_cast<int32_t>(int64_t{step.len} * (rank + 1) / ranks);
  const Leaver mine = choose_leaver(params, step, begin, end, order, params.vote_sum + start, shared.evict);
  // The next block will write over the place behind this block's last.
  const int32_t behind = end < step.len ? order[end] : 0;
  if (threadIdx.x == 0) {
    const bool some = mine.place < step.len;
    shared.told = {static_cast<uint32_t>(mine.score), static_cast<uint32_t>(mine.score >> 32),
                   static_cast<uint32_t>(mine.place),
                   static_cast<uint32_t>(some ? slot_at(order, mine.place, step.len) : 0)};
  }
  cluster_barrier();
  const int lane = threadIdx.x % 32;
  Leaver best = kNobody;
  int32_t slot = 0;
  if (lane < ranks) {
    const uint32_t low = cluster_read(&shared.told.score_low, lane), high = cluster_read(&shared.told.score_high, lane);
    best = {static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low),
            static_cast<int32_t>(cluster_read(&shared.told.place, lane))};
    slot = static_cast<int32_t>(cluster_read(&shared.told.slot, lane));
  }
  cluster_arrive();  // this block no longer reads the others
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Leaver other{__shfl_xor_sync(kFullWarp, best.score, offset), __shfl_xor_sync(kFullWarp, best.place, offset)};
    const int32_t other_slot = __shfl_xor_sync(kFullWarp, slot, offset);
    if (leaves_before(other, best)) {
      best = other;
      slot = other_slot;
    }
  }
  shift_down(order, max_of(begin, best.place), end, end < step.len ? behind : slot);
  if (rank == 0) {
    if (threadIdx.x == 0) params.row_len[row] = step.len;  // a length beyond the room is set right
    place_token(params, row, start + slot, work.new_vote[row]);
  }
  cluster_wait();
}

}  // namespace uncomp::kernels
