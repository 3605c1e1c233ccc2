// SPDX-License-Identifier: Apache-2.0
// The end of a step: one block finds out who leaves a row and puts the new token in that slot.
#pragma once

#include "core/constants.h"
#include "kernels/common/reduce.cuh"
#include "kernels/decode_evict/workspace.h"

namespace uncomp::kernels {

/// Vote sums of neighbouring places that a block holds at a time, and the pools' overlap at both ends.
inline constexpr int32_t kPlacesAtOnce = 4096;

struct EvictShared {
  int32_t sums[kPlacesAtOnce + kMaxPool - 1];
  Leaver leaver[32];
};

/// Slot of a place, inside the row whatever `order` holds.
__device__ __forceinline__ int32_t slot_at(const int32_t* order, int64_t place, int32_t len) {
  return clamp<int32_t>(order[place], 0, len - 1);
}

/// The first of all threads' leavers, returned to every thread. Barriers inside.
__device__ __forceinline__ Leaver first_to_leave(Leaver mine, EvictShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Leaver other{__shfl_xor_sync(kFullWarp, mine.score, offset), __shfl_xor_sync(kFullWarp, mine.place, offset)};
    if (leaves_before(other, mine)) mine = other;
  }
  if (lane == 0) shared.leaver[warp] = mine;
  __syncthreads();
  mine = shared.leaver[0];
  for (int w = 1; w < warps; ++w) {
    if (leaves_before(shared.leaver[w], mine)) mine = shared.leaver[w];
  }
  return mine;
}

/// The first to leave among places [first, last), known to every thread. `order` and `sums` are those of the row.
__device__ __forceinline__ Leaver choose_leaver(const DecodeEvictParams& params, const EvictStep& step, int32_t first,
                                                int32_t last, const int32_t* order, const int32_t* sums,
                                                EvictShared& shared) {
  const int32_t half = params.pool / 2;
  const bool largest = params.pool_mode == Pool::max;
  Leaver best = kNobody;
  first = max_of(first, step.first);
  last = min_of(last, step.candidates);
  for (int64_t from = first; from < last; from += kPlacesAtOnce) {
    const int32_t begin = static_cast<int32_t>(from);
    const int32_t end = static_cast<int32_t>(min_of<int64_t>(from + kPlacesAtOnce, last));
    const int32_t held = step.pool_begin(begin, half), count = step.pool_end(end - 1, half) - held;
    __syncthreads();  // the last round's sums have been read
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < count; i += blockDim.x) {
      shared.sums[i] = sums[slot_at(order, int64_t{held} + i, step.len)];
    }
    __syncthreads();
    for (int32_t place = begin + threadIdx.x; place < end; place += blockDim.x) {
      const int32_t stop = step.pool_end(place, half) - held;
      int32_t i = step.pool_begin(place, half) - held;
      int64_t score = shared.sums[i];
      if (largest) {
        int32_t top = shared.sums[i];
        for (++i; i < stop; ++i) top = max_of(top, shared.sums[i]);
        score = top;
      } else {
        for (++i; i < stop; ++i) score += shared.sums[i];
      }
      const Leaver leaver{score, place};
      if (leaves_before(leaver, best)) best = leaver;
    }
  }
  return first_to_leave(best, shared);
}

/// Moves the entries behind `begin` one place down, up to place `end` - 1, which takes `after`: chunks of places in
/// ascending order, each read as a whole before it is written.
__device__ __forceinline__ void shift_down(int32_t* order, int64_t begin, int64_t end, int32_t after) {
  constexpr int kAtOnce = 4;
  for (int64_t from = begin; from < end; from += kAtOnce * blockDim.x) {
    int32_t held[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t i = from + u * static_cast<int64_t>(blockDim.x) + threadIdx.x;
      held[u] = i + 1 < end ? order[i + 1] : after;
    }
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t i = from + u * static_cast<int64_t>(blockDim.x) + threadIdx.x;
      if (i < end) order[i] = held[u];
    }
  }
}

/// Copies `bytes` (a multiple of 16, both ends on 16-byte borders).
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int32_t bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) {
    static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
  }
}

/// Puts the new token, whose vote is `own`, in arena slot `target`, and moves the ring on.
__device__ __forceinline__ void place_token(const DecodeEvictParams& params, int32_t row, int64_t target, int32_t own) {
  const int64_t batch = row / params.rows, kv_head = row % params.rows / params.rows_per_kv;
  const int32_t ring_row = vote_ring_row(params.vote_step[row], params.vote_window);
  const int32_t bytes = dtype_bytes(params.dtype);
  copy_bytes(static_cast<char*>(params.key_rows) + target * params.key_dim * bytes,
             static_cast<const char*>(params.key) + (batch * params.key_batch + kv_head * params.key_head) * bytes,
             params.key_dim * bytes);
  copy_bytes(
      static_cast<char*>(params.value_rows) + target * params.value_dim * bytes,
      static_cast<const char*>(params.value) + (batch * params.value_batch + kv_head * params.value_head) * bytes,
      params.value_dim * bytes);
  for (int w = threadIdx.x; w < params.vote_window; w += blockDim.x) {
    params.votes[w * params.capacity + target] = w == ring_row ? own : 0;
  }
  __syncthreads();  // every thread has read vote_step
  if (threadIdx.x == 0) {
    params.vote_sum[target] = own;
    params.slot_position[target] = params.position[batch];
    params.vote_step[row] = vote_ring_row(ring_row + 1, params.vote_window);
  }
}

/// Steps 3 to 5 of the contract. All votes of the row are written, and seen by this block. Block-uniform arguments.
__device__ __forceinline__ void evict_row(const DecodeEvictParams& params, const DecodeEvictWorkspace& work,
                                          int32_t row, const EvictStep& step, EvictShared& shared) {
  if (step.kind == EvictStep::Kind::nothing) return;
  const int64_t start = params.ragged().start(row);
  const int32_t own = work.new_vote[row];
  int32_t* order = params.order + start;
  int32_t slot = step.len;
  if (step.kind == EvictStep::Kind::evict) {
    const int32_t place = choose_leaver(params, step, 0, step.len, order, params.vote_sum + start, shared).place;
    slot = slot_at(order, place, step.len);
    __syncthreads();  // every thread knows the slot before order changes
    shift_down(order, place, step.len, slot);
    if (threadIdx.x == 0) params.row_len[row] = step.len;  // a length beyond the room is set right
  } else {
    __syncthreads();  // every thread has read row_len and vote_step before they change
    if (threadIdx.x == 0) {
      order[slot] = slot;
      params.row_len[row] = step.len + 1;
    }
  }
  place_token(params, row, start + slot, own);
}

}  // namespace uncomp::kernels
