// SPDX-License-Identifier: Apache-2.0
// The same block-wide attention for fp32 rows, on plain multiply-adds: a twin without rounding, not a fast path.
#pragma once

#include "core/constants.h"
#include "kernels/common/reduce.cuh"
#include "kernels/decode_attention/slice.cuh"

namespace uncomp::kernels {

template <int kTile, int kHeads, int kRing>
struct alignas(16) SliceShared<float, kTile, kHeads, kRing> {
  static constexpr int kWarps = kSliceWarps, kThreads = kSliceThreads, kOutStride = kTile + 4, kQueryStride = kTile;
  float query[kHeads * kTile];
  float out[kSliceWarps][kHeads][kOutStride];
  float top[kSliceWarps][kHeads];
  float sum[kSliceWarps][kHeads];
};

/// Keys are read; a caller that makes them passes its own (slot, key [kTile] in shared memory of the warp).
struct NoMaker {
  __device__ __forceinline__ void operator()(int, float*) const {}
};

/// A warp sees one slot at a time; a lane holds every 32nd channel. With `make` nothing is read through `key`.
template <int kTile, int kHeads, int kRing, class OnScore = NoScores, class Prepare = NoPrepare, class Make = NoMaker>
__device__ __forceinline__ void attend_slice(SliceShared<float, kTile, kHeads, kRing>& shared, const float* key,
                                             const float* value, int count, int key_dim, int value_dim,
                                             float scale_log2, OnScore on_score = {}, Prepare prepare = {},
                                             Make make = {}, float* made = nullptr) {
  prepare();
  constexpr int kLaneChannels = kTile / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float out[kHeads][kLaneChannels] = {}, top[kHeads], sum[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    top[h] = -INFINITY;
    sum[h] = 0.0f;
  }
  for (int first = warp * kWarpSlots; first < count; first += kSliceSlots) {
    for (int slot = first; slot < min(first + kWarpSlots, count); ++slot) {
      float k[kLaneChannels], v[kLaneChannels];
      if constexpr (!std::is_same_v<Make, NoMaker>) make(slot, made);
#pragma unroll
      for (int j = 0; j < kLaneChannels; ++j) {
        const int channel = lane + 32 * j;
        if constexpr (std::is_same_v<Make, NoMaker>) {
          k[j] = channel < key_dim ? key[static_cast<int64_t>(slot) * key_dim + channel] : 0.0f;
        } else {
          k[j] = channel < key_dim ? made[channel] : 0.0f;
        }
        v[j] = channel < value_dim ? value[static_cast<int64_t>(slot) * value_dim + channel] : 0.0f;
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < kLaneChannels; ++j) dot += k[j] * shared.query[h * kTile + lane + 32 * j];
        const float logit = warp_sum(dot) * scale_log2;
        if (lane == 0) on_score(slot, h, logit);
        const float best = fmaxf(top[h], logit), base = finite_or_zero(best);
        const float shrink = exp2f(top[h] - base), weight = exp2f(logit - base);
        top[h] = best;
        sum[h] = sum[h] * shrink + weight;
#pragma unroll
        for (int j = 0; j < kLaneChannels; ++j) out[h][j] = out[h][j] * shrink + weight * v[j];
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (lane == 0) {
      shared.top[warp][h] = top[h];
      shared.sum[warp][h] = sum[h];
    }
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) shared.out[warp][h][lane + 32 * j] = out[h][j];
  }
  __syncthreads();
}

}  // namespace uncomp::kernels
