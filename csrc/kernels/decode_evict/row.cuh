// SPDX-License-Identifier: Apache-2.0
// A whole step in one launch: the blocks of one cluster share a row. Each attends over its slice of the slots and keeps
// the logits; they tell each other their softmax states, turn the logits into votes, look up the vote sums of their
// slice of the places in each other's shared memory, and agree on who leaves. What they tell each other goes as mail
// (common/cluster.cuh): a cluster barrier would wait for all global writes before it.
#pragma once

#include <cstddef>
#include <type_traits>

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

/// What a block knows of its row besides the slice. Arrays by rank, or by warp of a rank, are written by that rank.
/// What is done with gives its place away, for the sake of logits: a rank tells its departures after all ranks have
/// joined the states (sums_ready), and a block weighs ranks after it has made the new token's logits.
struct alignas(16) RowShared {
  union {
    float2 state[kMostRanks][kMaxGroupSize];  // largest logit, sum of 2^(logit - largest)
    Departure departure[kMostRanks * kSliceWarps];
  };
  union {
    float new_key[kMaxHeadDim];
    float weight[kMostRanks + 1][kMaxGroupSize];  // of each rank's output; the last is the new token's
  };
  float lse[kMaxGroupSize], sum[kMaxGroupSize], new_logit[kMaxGroupSize];
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
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < part.count; i += kSliceThreads) {
      cp_async4(old + i, ring + i);
      cp_async4(sum + i, sums + i);
    }
    const int32_t* from = order + part.held;
    int32_t* to = slot + (part.held - part.first);
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < part.stop - part.held; i += kSliceThreads) cp_async4(to + i, from + i);
    cp_async_commit();
  }
};

/// The second block of a multiprocessor waits, in the first of several rounds (late_clocks). Which one is the second
/// need not be exact: nothing but time depends on it.
__device__ __forceinline__ void start_late(const RankPlan& plan) {
  if (static_cast<int32_t>(blockIdx.y * gridDim.x + blockIdx.x) >= plan.first_round) return;
  uint32_t warp_place;
  asm volatile("mov.u32 %0, %%warpid;\n" : "=r"(warp_place));
  if (warp_place < kSliceWarps) return;
  const long long until = clock64() + plan.late_clocks;
#if __CUDA_ARCH__ >= 700
  while (clock64() < until) __nanosleep(200);
#endif
}

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

/// The new token's K and V, 16 bytes a thread: the threads of the first half have K, the others V.
struct NewToken {
  uint4 piece;
  __device__ __forceinline__ static int thread() { return static_cast<int>(threadIdx.x) % (kSliceThreads / 2); }
  __device__ __forceinline__ static bool is_key() { return threadIdx.x < kSliceThreads / 2; }
  static_assert(kMaxHeadDim * 4 <= 16 * kSliceThreads / 2);

  __device__ __forceinline__ void load(const DecodeEvictParams& params, const RowPart& part) {
    const int32_t bytes = dtype_bytes(params.dtype), dim = is_key() ? params.key_dim : params.value_dim;
    const int64_t at = is_key() ? part.batch * params.key_batch + part.kv_head * params.key_head
                                : part.batch * params.value_batch + part.kv_head * params.value_head;
    const char* from = static_cast<const char*>(is_key() ? params.key : params.value) + at * bytes;
    if (thread() * 16 < dim * bytes) piece = reinterpret_cast<const uint4*>(from)[thread()];
  }
  __device__ __forceinline__ void store(const DecodeEvictParams& params, int64_t slot) const {
    const int32_t bytes = dtype_bytes(params.dtype), dim = is_key() ? params.key_dim : params.value_dim;
    char* to = static_cast<char*>(is_key() ? params.key_rows : params.value_rows) + slot * dim * bytes;
    if (thread() * 16 < dim * bytes) reinterpret_cast<uint4*>(to)[thread()] = piece;
  }
};

/// The new token's key on its way into shared memory.
template <class T>
struct NewKeyInFlight {
  T data[kMaxHeadDim / kSliceThreads];

  __device__ __forceinline__ NewKeyInFlight(const DecodeEvictParams& params, const RowPart& part) {
    const T* key = static_cast<const T*>(params.key) + part.batch * params.key_batch + part.kv_head * params.key_head;
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / kSliceThreads; ++j) {
      const int channel = static_cast<int>(threadIdx.x) + j * kSliceThreads;
      data[j] = channel < params.key_dim ? key[channel] : from_float<T>(0.0f);
    }
  }
  __device__ __forceinline__ void store(RowShared& shared) const {
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / kSliceThreads; ++j) {
      shared.new_key[static_cast<int>(threadIdx.x) + j * kSliceThreads] = to_float(data[j]);
    }
  }
};

/// Logits [g] of the new token, the heads of a warp by that warp.
template <class Slice>
__device__ __forceinline__ void new_logits(const DecodeEvictParams& params, const Slice& slice, float scale,
                                           RowShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int head = warp; head < params.group_size; head += kSliceWarps) {
    float dot = 0.0f;
    for (int channel = lane; channel < params.key_dim; channel += 32) {
      dot += to_float(slice.query[head * Slice::kQueryStride + channel]) * shared.new_key[channel];
    }
    dot = warp_sum(dot);
    if (lane == 0) shared.new_logit[head] = dot * scale;
  }
}

/// Calls work(i, n) for all i = threadIdx.x + k kSliceThreads below `count`: n of them, kSliceThreads apart, at once.
/// All of a call's loads can fly together; what is left over is done one by one, so that a short slice has no idle
/// steps.
template <class Work>
__device__ __forceinline__ void in_batches(int32_t count, Work work) {
  constexpr int kBatch = 4;
  int32_t i = threadIdx.x;
#pragma unroll 1
  for (; i + (kBatch - 1) * kSliceThreads < count; i += kBatch * kSliceThreads) {
    work(i, std::integral_constant<int, kBatch>{});
  }
#pragma unroll 1
  for (; i < count; i += kSliceThreads) work(i, std::integral_constant<int, 1>{});
}

/// Turns the logits of a near slice into votes; the new sums stay on chip as well.
template <class Stage>
__device__ __forceinline__ void vote_near(const DecodeEvictParams& params, const RowPart& part, const float* logits,
                                          int32_t stride, const float* lse, int32_t* ring, int32_t* sums,
                                          const Stage& stage) {
  const int32_t bits = vote_scale_bits(params.vote_window);
  in_batches(part.count, [&](int32_t i, auto batch) {
    constexpr int kTokens = decltype(batch)::value;
    int32_t vote[kTokens], sum[kTokens];
    votes_of(params, logits + i, kSliceThreads, stride, lse, bits, vote);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      sum[t] = moved_sum(stage.sum[i + t * kSliceThreads], stage.old[i + t * kSliceThreads], vote[t]);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      stage.sum[i + t * kSliceThreads] = sum[t];
      ring[i + t * kSliceThreads] = vote[t];
      sums[i + t * kSliceThreads] = sum[t];
    }
  });
}

}  // namespace uncomp::kernels
