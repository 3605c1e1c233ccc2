// SPDX-License-Identifier: Apache-2.0
// A whole step in one launch: the blocks of one cluster share a row. Each attends over its slice of the slots and keeps
// the logits; they tell each other their softmax states, turn the logits into votes, look up the vote sums of their
// slice of the places in each other's shared memory, and agree on who leaves. What they tell each other goes as mail
// (common/cluster.cuh): a cluster barrier would wait for all global writes before it.
#pragma once

#include <cstddef>

#include "core/constants.h"
#include "core/votes.h"
#include "kernels/common/cluster.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/decode_attention/slice.cuh"
#include "kernels/decode_evict/vote.cuh"

namespace uncomp::kernels {

/// Someone who may leave, with the slot.
struct alignas(16) Departure {
  int64_t score;
  int32_t place, slot;
  __device__ __forceinline__ Leaver leaver() const { return {score, place}; }
};

/// What a block knows of its row besides the slice. Arrays by rank, or by warp of a rank, are
/// written by that rank.
struct alignas(16) RowShared {
  float2 state[kMostRanks][kMaxGroupSize];  // largest logit, sum of 2^(logit - largest)
  Departure departure[kMostRanks * kSliceWarps];
  float weight[kMostRanks + 1][kMaxGroupSize];  // of each rank's output; the last is the new token's
  float lse[kMaxGroupSize], sum[kMaxGroupSize], new_logit[kMaxGroupSize];
  float new_key[kMaxHeadDim];
  uint64_t states_here, sums_ready, departures_here;  // mail barriers
};

/// One block's part of a row. Slots and places count inside the row.
struct RowPart {
  EvictStep step;
  int64_t start;  // of the row in the arena
  int64_t batch, kv_head;
  int32_t row, rank, ranks;
  int32_t rank_bits;     // ranks = 1 << rank_bits
  int32_t share;         // channels of the output of a rank, over all heads
  int32_t slice;         // slots of a rank
  int32_t begin, count;  // slots, and places, of this one
  int32_t ring_row;
  int32_t first;       // place that arrays by place begin with: pool / 2 before the slice, may be negative
  int32_t held, stop;  // places whose slots this rank knows: its own, and their neighbours
  bool near;           // logits, votes and order of every rank fit on chip
};

/// Votes and order of a rank's slice, on chip: in what the slice's copies leave free once they are done. Arrays by
/// place begin `pool / 2` places before the slice.
template <class Slice>
struct RowStage {
  static constexpr int kUsed = static_cast<int>(offsetof(Slice, out) + sizeof(Slice::out));
  static constexpr int kLeft = static_cast<int>(offsetof(Slice, top)) - kUsed;
  static constexpr bool kApart = kLeft < 24 * 1024;
  static constexpr int kBytes = kApart ? 24 * 1024 : kLeft;
  static constexpr int32_t kSpare = kMaxPool + 7;
  static constexpr int32_t kSlots = (kBytes / 4 - 2 * kSpare) / 3 / 4 * 4;

  int32_t* sum;       // [slots]           vote sums
  int32_t* slot;      // [slots + spare]   by place
  int32_t* old;       // [slots]           ring row to replace; later
  int32_t* by_place;  // [slots + spare]   vote sums by place

  __device__ __forceinline__ RowStage(unsigned char* slice, unsigned char* apart)
      : sum(reinterpret_cast<int32_t*>(kApart ? apart : slice + kUsed)),
        slot(sum + kSlots),
        old(slot + kSlots + kSpare),
        by_place(old) {}

  /// Sets copies of a near slice on their way.
  __device__ __forceinline__ void fetch(const RowPart& part, const int32_t* ring, const int32_t* sums,
                                        const int32_t* order) const {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < part.count; i += kSliceThreads) {
      cp_async4(old + i, ring + i);
      cp_async4(sum + i, sums + i);
    }
    const int32_t* from = order + part.held;
    int32_t* to = slot + (part.held - part.first);
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < part.stop - part.held; i += kSliceThreads) cp_async4(to + i, from + i);
    cp_async_commit();
  }
};

template <class T>
__device__ __forceinline__ void tell(const RowPart& part, T* place, int32_t rank, T value, uint64_t* barrier) {
  if (part.ranks > 1) {
    mail(place, static_cast<uint32_t>(rank), value, barrier);
  } else {
    *place = value;
  }
}

/// Waits for what all ranks told this block.
__device__ __forceinline__ void hear(const RowPart& part, uint64_t* barrier) {
  if (part.ranks > 1) {
    mail_wait(barrier);
  } else {
    __syncthreads();
  }
}

/// Asks L2 for up to 32 words a thread.
__device__ __forceinline__ void fetch_words(const int32_t* words, int32_t count) {
  const int32_t i = static_cast<int32_t>(threadIdx.x) * 32;
  if (i < count + 31) asm volatile("prefetch.global.L2 [%0];\n" ::"l"(words + min_of(i, count - 1)));
}

template <class T>
__device__ __forceinline__ void load_new_key(const DecodeEvictParams& params, const RowPart& part, RowShared& shared) {
  const T* key = static_cast<const T*>(params.key) + part.batch * params.key_batch + part.kv_head * params.key_head;
#pragma unroll
  for (int j = 0; j < kMaxHeadDim / kSliceThreads; ++j) {
    const int channel = static_cast<int>(threadIdx.x) + j * kSliceThreads;
    if (channel >= params.key_dim) break;
    shared.new_key[channel] = to_float(key[channel]);
  }
}

/// Logits [g] of the new token, the heads of a warp by that warp.
template <class T>
__device__ __forceinline__ void new_logits(const DecodeEvictParams& params, const T* query, float scale,
                                           RowShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int head = warp; head < params.group_size; head += kSliceWarps) {
    float dot = 0.0f;
    for (int channel = lane; channel < params.key_dim; channel += 32) {
      dot += to_float(query[head * params.query_head + channel]) * shared.new_key[channel];
    }
    dot = warp_sum(dot);
    if (lane == 0) shared.new_logit[head] = dot * scale;
  }
}

/// Turns the logits of a near slice into votes; the new sums stay on chip as well.
template <class Stage>
__device__ __forceinline__ void vote_near(const DecodeEvictParams& params, const RowPart& part, const float* logits,
                                          int64_t stride, const float* lse, int32_t* ring, int32_t* sums,
                                          const Stage& stage) {
  const int32_t bits = vote_scale_bits(params.vote_window);
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < part.count; i += kSliceThreads) {
    const int32_t vote = vote_of(params, logits + i, stride, lse, bits);
    const int32_t sum = moved_sum(stage.sum[i], stage.old[i], vote);
    stage.sum[i] = sum;
    ring[i] = vote;
    sums[i] = sum;
  }
}

}  // namespace uncomp::kernels
