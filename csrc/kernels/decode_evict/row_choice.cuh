// SPDX-License-Identifier: Apache-2.0
// Who leaves a row: the vote sums of a block's places, from the blocks that have the slots; pools; the smallest of all.
#pragma once

#include <type_traits>

#include "kernels/decode_evict/evict.cuh"
#include "kernels/decode_evict/row.cuh"

namespace uncomp::kernels {

/// Fills `sums` for places `first` to `first` + count - 1 with `sum_of(place)`, and with what changes no pool where a
/// place is no candidate.
template <class SumOf>
__device__ __forceinline__ void look_up(const EvictStep& step, int32_t first, int32_t count, Pool mode, int32_t* sums,
                                        SumOf sum_of) {
  const int32_t neutral = mode == Pool::max ? INT32_MIN : 0;
  in_batches(count, [&](int32_t i, auto batch) {
    int32_t sum[decltype(batch)::value];
#pragma unroll
    for (int t = 0; t < decltype(batch)::value; ++t) {
      const int32_t at = i + t * kSliceThreads, place = first + at;
      sum[t] = place >= 0 && place < step.candidates ? sum_of(at) : neutral;
    }
#pragma unroll
    for (int t = 0; t < decltype(batch)::value; ++t) sums[i + t * kSliceThreads] = sum[t];
  });
}

/// The first to leave of a warp's departures, returned to every lane: word by word, because a warp finds the smallest
/// word at once.
__device__ __forceinline__ Departure first_of_warp(const Departure& mine) {
  const int32_t high = static_cast<int32_t>(mine.score >> 32);
  const uint32_t low = static_cast<uint32_t>(mine.score);
  const int32_t best_high = __reduce_min_sync(kFullWarp, high);
  const uint32_t best_low = __reduce_min_sync(kFullWarp, high == best_high ? low : UINT32_MAX);
  const bool least = high == best_high && low == best_low;
  const int32_t place = __reduce_min_sync(kFullWarp, least ? mine.place : INT32_MAX);
  const unsigned who = __ballot_sync(kFullWarp, least && mine.place == place);
  return {static_cast<int64_t>(best_high) << 32 | best_low, place, __shfl_sync(kFullWarp, mine.slot, __ffs(who) - 1)};
}

/// The first to leave among places [from, to), each thread looking at runs of three: a pool sum of three neighbours
/// shares all but two values. `sums` begins `half` places before `from`, `slots` begins with the same place.
template <bool kLargest>
__device__ __forceinline__ Departure choose_among(const EvictStep& step, int32_t half, int32_t from, int32_t to,
                                                  const int32_t* sums, const int32_t* slots, Departure best) {
  using Score = std::conditional_t<kLargest, int32_t, int64_t>;
  constexpr int kRun = 3;
  const auto join = [](Score a, Score b) { return kLargest ? max_of(a, b) : a + b; };
  const int32_t pool = 2 * half + 1, begin = max_of(from, step.first), end = min_of(to, step.candidates);
  for (int32_t place = begin + kRun * static_cast<int32_t>(threadIdx.x); place < end; place += kRun * kSliceThreads) {
    const int32_t* x = sums + (place - from);
    Score score[kRun] = {x[0], x[1], x[2]};
    if (pool > 1) {
      Score shared = x[2];
      for (int32_t j = 3; j < pool; ++j) shared = join(shared, x[j]);
      const Score after = x[pool];
      score[0] = join(join(score[0], score[1]), shared);
      score[2] = join(join(shared, after), x[pool + 1]);
      score[1] = join(join(score[1], shared), after);
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (place + k < end && score[k] < best.score) {
        best = {score[k], place + k, clamp<int32_t>(slots[place + k - from + half], 0, step.len - 1)};
      }
    }
  }
  return best;
}

/// The first to leave among the places of a warp's threads, known to its lanes; kNobody's score where none may.
/// Barriers inside.
template <class Stage>
__device__ __forceinline__ Departure choose_in_slice(const DecodeEvictParams& params, const RowPart& part,
                                                     const int32_t* order, const int32_t* sums, const Stage& stage) {
  const EvictStep& step = part.step;
  const int32_t half = params.pool / 2, end = part.begin + part.count;
  const auto choose = [&](int32_t from, int32_t to, const Departure& best) {
    return params.pool_mode == Pool::max ? choose_among<true>(step, half, from, to, stage.by_place, stage.slot, best)
                                         : choose_among<false>(step, half, from, to, stage.by_place, stage.slot, best);
  };
  Departure best{kNobody.score, kNobody.place, 0};
  if (part.near) {
    const float per_slice = 1.0f / static_cast<float>(part.slice);
    look_up(step, part.first, part.count + 2 * half, params.pool_mode, stage.by_place, [&](int32_t i) {
      const int32_t slot = clamp<int32_t>(stage.slot[i], 0, step.len - 1);
      if (part.ranks == 1) return stage.sum[slot];
      const int32_t owner = small_quotient(slot, per_slice);
      const int32_t* there = stage.sum + (slot - owner * part.slice);
      return static_cast<int32_t>(cluster_read(reinterpret_cast<const uint32_t*>(there), static_cast<uint32_t>(owner)));
    });
    __syncthreads();
    best = choose(part.begin, end, best);
  } else {
    for (int32_t from = part.begin; from < end; from += min_of(Stage::kSlots, end - from)) {
      const int32_t to = from + min_of(Stage::kSlots, end - from);
      __syncthreads();  // the last round's places have been read
      look_up(step, from - half, to - from + 2 * half, params.pool_mode, stage.by_place, [&](int32_t i) {
        const int32_t slot = slot_at(order, from - half + i, step.len);
        stage.slot[i] = slot;
        return sums[slot];
      });
      __syncthreads();
      best = choose(from, to, best);
    }
  }
  return first_of_warp(best);
}

/// The first to leave of all warps' departures, returned to every thread.
__device__ __forceinline__ Departure first_of_ranks(const RowPart& part, const Departure* departure, int warps) {
  const int lane = threadIdx.x % 32, all = part.ranks * warps;
  Departure best = departure[lane < all ? lane : 0];
  for (int i = lane + 32; i < all; i += 32) {
    if (leaves_before(departure[i].leaver(), best.leaver())) best = departure[i];
  }
  return first_of_warp(best);
}

}  // namespace uncomp::kernels
