// SPDX-License-Identifier: Apache-2.0
// The steps of select_tokens on one row: scores to keys, keys to histograms, histograms to the digits of the threshold.
#pragma once

#include "core/select_keys.h"
#include "core/select_plan.h"
#include "kernels/common/cluster.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/select_tokens.h"

namespace uncomp::kernels::select_steps {

inline constexpr int kBatch = 4;  // columns that a thread has in flight
inline constexpr int kSelectShift1 = kSelectBits2 + kSelectBits3;

/// Shared memory before the keys.
struct Scratch {
  uint32_t histogram[kSelectHistogramWords];
  uint32_t sum[32], above[32], equal[32];  // per warp
  uint32_t found[2];                       // digit, keys above it
  uint32_t totals[2];                      // of this block: keys above T, keys equal to T
};
static_assert(sizeof(Scratch) <= 4 * (kSelectHistogramWords + kSelectScratchWords));

/// Blocks of the row this block works on.
struct Team {
  int32_t rank, blocks;

  /// A barrier over the row's blocks in two halves.
  __device__ void arrive() const {
    if (blocks > 1) cluster_arrive();
  }
  __device__ void wait() const {
    if (blocks > 1) {
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
  __device__ void barrier() const {
    arrive();
    wait();
  }
  /// Sum of a word of shared memory over the blocks. All reads are in flight together; `blocks` is a power of two.
  __device__ uint32_t sum(const uint32_t* p) const {
    if (blocks == 1) return *p;
    uint32_t part[kSelectMaxBlocks], total = 0;
#pragma unroll
    for (int32_t r = 0; r < kSelectMaxBlocks; ++r) part[r] = cluster_read(p, r & (blocks - 1));
#pragma unroll
    for (int32_t r = 0; r < kSelectMaxBlocks; ++r) total += r < blocks ? part[r] : 0u;
    return total;
  }
};

struct Digit {
  uint32_t value, above;  // the digit of T, and the keys whose digit is larger
};

/// The digit in which the `need`-th largest key lies. Every thread owns a run of bins, highest first.
__device__ inline Digit find_digit(const Team& team, const uint32_t* histogram, int32_t bins, uint32_t need,
                                   Scratch& scratch) {
  const int32_t run = bins / static_cast<int32_t>(blockDim.x);
  const uint32_t* bin = histogram + bins - 1 - static_cast<int32_t>(threadIdx.x) * run;
  uint32_t held = 0, total = 0;
#pragma unroll 2
  for (int32_t i = 0; i < run; ++i) held += team.sum(bin - i);
  uint32_t above = block_exclusive_sum(held, scratch.sum, &total);
  if (above < need && need <= above + held) {
    uint32_t here = team.sum(bin);
    while (above + here < need) {
      above += here;
      here = team.sum(--bin);
    }
    scratch.found[0] = static_cast<uint32_t>(bin - histogram);
    scratch.found[1] = above;
  }
  __syncthreads();
  return {scratch.found[0], scratch.found[1]};
}

/// Joins `width` scores upwards from each of a thread's columns.
template <bool kMax>
__device__ void pool_columns(const float* buffer, const int32_t (&column)[kBatch], int32_t width,
                             float (&pool)[kBatch]) {
  for (int32_t d = 0; d < width; ++d) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const float x = buffer[column[k] + d];
      pool[k] = kMax ? larger_number(pool[k], x) : add_rounded(pool[k], x);
    }
  }
}

/// Turns columns [begin, begin + count) of a row into pooled keys and counts their highest digits. Pooling sees columns
/// [0, limit). `buffer` holds the scores of a stage from half a pool before it to half a pool behind it, so the pool of
/// the stage's column i starts at buffer[i]. No later column reads that place, and resident keys are put there.
template <bool kResident>
__device__ void load_keys(const SelectTokensParams& p, const float* scores, int32_t begin, int32_t count, int32_t limit,
                          int32_t stage, float* buffer, uint32_t* keys, uint32_t* histogram) {
  const int32_t thread = threadIdx.x, threads = blockDim.x, half = p.pool / 2;
  const float nothing = pool_nothing(p.pool_mode);
  for (int32_t at = 0; at < count; at += stage) {
    const int32_t held = min_of(stage, count - at), origin = begin + at - half;
    for (int32_t i = thread; i < held + 2 * half; i += threads) {
      const int32_t c = origin + i;
      if (c >= 0 && c < limit) {
        cp_async4(buffer + i, scores + c);
      } else {
        buffer[i] = nothing;
      }
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // the scores are here, the histograms zero
    for (int32_t tile = 0; tile < held; tile += kBatch * threads) {
      int32_t column[kBatch];
      float pool[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        column[k] = min_of(tile + k * threads + thread, held - 1);
        pool[k] = nothing;
      }
      if (p.pool_mode == Pool::max) {
        pool_columns<true>(buffer, column, p.pool, pool);
      } else {
        pool_columns<false>(buffer, column, p.pool, pool);
      }
      if (kResident) __syncthreads();  // all scores of the tile are read
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int32_t i = tile + k * threads + thread;
        if (i >= held) continue;
        const uint32_t key = pool_key(pool[k], p.pool, p.pool_mode);
        keys[at + i] = key;
        atomicAdd(&histogram[key >> kSelectShift1], 1u);
      }
    }
    if (!kResident) __syncthreads();  // before the next stage overwrites the scores
  }
}

/// Counts the digit `key >> shift` of the keys whose upper bits, `key >> prefix_shift`, are `prefix`.
__device__ inline void count_digit(const uint32_t* keys, int32_t count, int prefix_shift, uint32_t prefix, int shift,
                                   uint32_t bins, uint32_t* histogram) {
  const int32_t thread = threadIdx.x, threads = blockDim.x;
  for (int32_t tile = 0; tile < count; tile += kBatch * threads) {
    uint32_t key[kBatch];
    bool live[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int32_t i = tile + k * threads + thread;
      live[k] = i < count;
      key[k] = live[k] ? keys[i] : 0u;
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (live[k] && key[k] >> prefix_shift == prefix) atomicAdd(&histogram[key[k] >> shift & (bins - 1)], 1u);
    }
  }
}

}  // namespace uncomp::kernels::select_steps
