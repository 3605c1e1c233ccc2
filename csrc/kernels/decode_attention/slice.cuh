// SPDX-License-Identifier: Apache-2.0
// Attention of up to 16 query heads over a run of neighbouring slots, by one block of four warps. Each warp takes 16 of
// every 64 slots, through its own ring of asynchronous copies and with its own running softmax, so the loop has no
// block barrier; the four states meet once, at the end.
//
//   load_query(shared, ...); __syncthreads();
//   attend_slice(shared, ...);                 // ends with a barrier: all threads may read the result
//   merge_warps(shared, head, channel)         // any thread, any (head, channel)
//   __syncthreads();                           // before `shared` is used again
#pragma once

#include <cstdint>

#include "core/splits.h"
#include "kernels/common/mma.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/swizzle.cuh"
#include "kernels/common/types.cuh"

namespace uncomp::kernels {

inline constexpr int kSliceWarps = 4;
inline constexpr int kSliceThreads = 32 * kSliceWarps;
inline constexpr int kWarpSlots = 16;
static_assert(kSliceWarps * kWarpSlots == kSplitSlots);

/// Shared memory of one block. Query and ring hold 16-byte chunks XOR-swizzled by their row, so that ldmatrix meets no
/// bank twice; the padding of `out` does the same for the final store.
template <class T, int kTile, int kHeads>
struct alignas(16) SliceShared {
  static constexpr int kRing = kTile == 64 ? 6 : kTile == 128 ? 4 : 2;  // keys and values in turn
  static constexpr int kOutStride = kTile + 4;
  T query[kHeads * kTile];
  union {
    T ring[kSliceWarps][kRing][kWarpSlots * kTile];
    float out[kSliceWarps][kHeads][kOutStride];  // unnormalised
  };
  float top[kSliceWarps][kHeads];  // largest logit, log2 units
  float sum[kSliceWarps][kHeads];
};
static_assert(sizeof(SliceShared<__half, 256, 16>) <= 81 * 1024, "two blocks must fit into 163 KiB");

/// The group's queries into shared memory; heads and channels beyond the real ones become zero.
template <class T, int kTile, int kHeads>
__device__ __forceinline__ void load_query(SliceShared<T, kTile, kHeads>& shared, const T* query, int64_t head_stride,
                                           int heads, int key_dim) {
  for (int i = threadIdx.x; i < kHeads * kTile; i += kSliceThreads) {
    const int head = i / kTile, channel = i % kTile;
    const bool live = head < heads && channel < key_dim;
    shared.query[swizzled<kTile>(head, channel / 8) + channel % 8] =
        live ? query[head * head_stride + channel] : from_float<T>(0.0f);
  }
}

/// Ignores scores; a caller that wants them passes its own (slot, head, logit in log2 units), called once for each
/// live slot and each of the kHeads columns, real or not.
struct NoScores {
  __device__ __forceinline__ void operator()(int, int, float) const {}
};

/// Attends over slots 0 .. count - 1 of key [.., Dk] and value [.., Dv]. Slots beyond are not read.
template <class T, int kTile, int kHeads, class OnScore = NoScores>
__device__ __forceinline__ void attend_slice(SliceShared<T, kTile, kHeads>& shared, const T* key, const T* value,
                                             int count, int key_dim, int value_dim, float scale_log2,
                                             OnScore on_score = {}) {
  using Shared = SliceShared<T, kTile, kHeads>;
  constexpr int kRing = Shared::kRing, kEntry = kWarpSlots * kTile, kChunks = kTile / 8, kNTiles = kHeads / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = count > warp * kWarpSlots ? (count - warp * kWarpSlots + kSplitSlots - 1) / kSplitSlots : 0;
  T* ring = shared.ring[warp][0];

  // One ring entry: 16 rows of keys (even entries) or values (odd ones); dead slots and spare channels become zeros.
  const int load_chunk = lane % kChunks, load_row = lane / kChunks;
  const auto load = [&](int entry, int place) {
    const int group = entry / 2;
    if (group < groups) {
      const bool is_value = entry % 2 == 1;
      const T* base = is_value ? value : key;
      const int dim = is_value ? value_dim : key_dim, first = group * kSplitSlots + warp * kWarpSlots;
#pragma unroll
      for (int j = 0; j < kWarpSlots * kChunks / 32; ++j) {
        const int row = load_row + j * (32 / kChunks);
        const bool live = first + row < count && load_chunk * 8 < dim;
        const T* from = live ? base + static_cast<int64_t>(first + row) * dim + load_chunk * 8 : base;
        cp_async16(ring + place * kEntry + swizzled<kTile>(row, load_chunk), from, live);
      }
    }
    cp_async_commit();  // an empty group keeps the count of groups in flight right
  };
  const auto next_place = [](int place) { return place + 1 == kRing ? 0 : place + 1; };

  float out[kTile / 16][kNTiles][4] = {};  // [channel, head] tiles
  float top[kNTiles][2], sum[kNTiles][2];  // heads 8 * n + 2 * (lane % 4) and the next; sum of this lane's slots only
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    top[n][0] = top[n][1] = -INFINITY;
    sum[n][0] = sum[n][1] = 0.0f;
  }

  int read = 0, write = kRing - 1;
#pragma unroll
  for (int entry = 0; entry < kRing - 1; ++entry) load(entry, entry);

  for (int group = 0; group < groups; ++group) {
    // Keys have arrived for every lane, and every lane is done with the entry that the next copy overwrites.
    cp_async_wait<kRing - 2>();
    __syncwarp();
    load(2 * group + kRing - 1, write);
    write = next_place(write);

    // Scores [16 slots, heads] = keys * query^T; even and odd steps apart, to halve the chain of dependent products.
    const T* keys = ring + read * kEntry;
    float score[kNTiles][4] = {}, odd[kNTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kTile / 32; ++k) {
      uint32_t a[4], b[4];
      ldmatrix_x4(a, keys + swizzled<kTile>(lane % 16, 4 * k + lane / 16));
      uint32_t a_odd[4];
      ldmatrix_x4(a_odd, keys + swizzled<kTile>(lane % 16, 4 * k + 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        ldmatrix_x4(b, shared.query + swizzled<kTile>(8 * n + lane % 8, 4 * k + lane / 8));
        const uint32_t even_b[2] = {b[0], b[1]}, odd_b[2] = {b[2], b[3]};
        mma_16x8x16<T>(score[n], a, even_b);
        mma_16x8x16<T>(odd[n], a_odd, odd_b);
      }
    }
    read = next_place(read);

    // Running softmax; a lane holds slots lane / 4 and + 8 of two neighbouring heads.
    const int first = group * kSplitSlots + warp * kWarpSlots, slot = first + lane / 4;
    uint32_t weight[kNTiles][2];
    float shrink[kNTiles][2];
    bool moved = false;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int my_slot = slot + (i / 2) * 8;
        const float logit = (score[n][i] + odd[n][i]) * scale_log2;
        if (my_slot < count) on_score(my_slot, 8 * n + 2 * (lane % 4) + i % 2, logit);
        score[n][i] = my_slot < count ? logit : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float best = fmaxf(score[n][i], score[n][i + 2]);
#pragma unroll
        for (int offset = 4; offset <= 16; offset *= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, offset));
        best = fmaxf(best, top[n][i]);
        const float base = finite_or_zero(best);
        shrink[n][i] = exp2f(top[n][i] - base);
        moved = moved || best != top[n][i];
        top[n][i] = best;
        score[n][i] = exp2f(score[n][i] - base);
        score[n][i + 2] = exp2f(score[n][i + 2] - base);
        sum[n][i] = sum[n][i] * shrink[n][i] + (score[n][i] + score[n][i + 2]);
      }
      // [slot, head] in registers becomes the [slot, head] operand of the next product, which wants it transposed.
      weight[n][0] = transpose_8x8(pack2<T>(score[n][0], score[n][1]));
      weight[n][1] = transpose_8x8(pack2<T>(score[n][2], score[n][3]));
    }
    if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
      for (int m = 0; m < kTile / 16; ++m) {
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[m][n][i] *= shrink[n][i % 2];
        }
      }
    }

    // out^T [channels, heads] += values^T * weights^T.
    cp_async_wait<kRing - 2>();
    __syncwarp();
    load(2 * group + kRing, write);
    write = next_place(write);
    const T* values = ring + read * kEntry;
#pragma unroll
    for (int m = 0; m < kTile / 16; ++m) {
      uint32_t a[4];
      ldmatrix_x4_trans(a, values + swizzled<kTile>(lane / 16 * 8 + lane % 8, 2 * m + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) mma_16x8x16<T>(out[m][n], a, weight[n]);
    }
    read = next_place(read);
  }

  // The warp's state into shared memory, over the ring: all copies have landed and all warps are done reading.
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    const int head = 8 * n + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int offset = 4; offset <= 16; offset *= 2) sum[n][i] += __shfl_xor_sync(0xffffffffu, sum[n][i], offset);
      if (lane < 4) {
        shared.top[warp][head + i] = top[n][i];
        shared.sum[warp][head + i] = sum[n][i];
      }
#pragma unroll
      for (int m = 0; m < kTile / 16; ++m) {
        shared.out[warp][head + i][16 * m + lane / 4] = out[m][n][i];
        shared.out[warp][head + i][16 * m + lane / 4 + 8] = out[m][n][i + 2];
      }
    }
  }
  __syncthreads();
}

/// Softmax state of one head, and one channel of its unnormalised output.
struct HeadState {
  float top, sum, out;
};

/// The four warps' states as one, in warp order.
template <class Shared>
__device__ __forceinline__ HeadState merge_warps(const Shared& shared, int head, int channel) {
  HeadState state{-INFINITY, 0.0f, 0.0f};
#pragma unroll
  for (int w = 0; w < kSliceWarps; ++w) state.top = fmaxf(state.top, shared.top[w][head]);
  const float base = finite_or_zero(state.top);
#pragma unroll
  for (int w = 0; w < kSliceWarps; ++w) {
    const float weight = exp2f(shared.top[w][head] - base);
    state.sum += weight * shared.sum[w][head];
    state.out += weight * shared.out[w][head][channel];
  }
  return state;
}

}  // namespace uncomp::kernels
