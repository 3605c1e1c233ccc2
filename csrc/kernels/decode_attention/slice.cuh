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

#include <type_traits>

#include "kernels/decode_attention/slice_shared.cuh"

namespace uncomp::kernels {

/// Exponents stay below this power of two: the shift of a running softmax moves only when a logit exceeds it by more.
inline constexpr float kSlack = 8.0f;

/// Offset in an entry of the ring, in elements, of a row's 16-byte chunk.
template <int kTile>
__device__ __forceinline__ int ring_offset(int row, int chunk) {
  return row * kTile + (chunk ^ (row % 8)) * 8;
}
/// `chunks` chunks behind a chunk 0 or 1 at `offset`, an even number.
__device__ __forceinline__ int chunks_on(int offset, int chunks) {
  return (offset ^ (chunks % 8 * 8)) + chunks / 8 * 64;
}

/// One warp's copies: 16 rows of keys or values into an entry of its ring. Dead slots and spare channels become zeros.
template <class T, int kTile>
struct RowCopies {
  static constexpr int kChunks = kTile / 8, kRows = 32 / kChunks;
  int row, chunk, offset;  // of this lane's first copy

  __device__ __forceinline__ explicit RowCopies(int lane)
      : row(lane / kChunks), chunk(lane % kChunks), offset(ring_offset<kTile>(row, chunk)) {}

  /// Place of this lane's copy j, which is kRows rows behind the one before.
  __device__ __forceinline__ T* place(T* entry, int j) const {
    return entry + (offset ^ (j * kRows % 8 * 8)) + j * kRows * kTile;
  }

  /// Slots `first` to `first` + 15 of `rows` [.., dim], of which those below `count` are live.
  __device__ __forceinline__ void issue(T* entry, const T* rows, int dim, int first, int count) const {
    if (dim == kTile && first + kWarpSlots <= count) {
      const T* const from = rows + static_cast<int64_t>(first + row) * kTile + chunk * 8;
#pragma unroll
      for (int j = 0; j < kWarpSlots / kRows; ++j) cp_async16(place(entry, j), from + j * kRows * kTile, true);
      return;
    }
#pragma unroll 1
    for (int j = 0; j < kWarpSlots / kRows; ++j) {
      const int slot = first + row + j * kRows;
      const bool live = slot < count && chunk * 8 < dim;
      const T* const from = live ? rows + static_cast<int64_t>(slot) * dim + chunk * 8 : rows;
      cp_async16(place(entry, j), from, live);
    }
  }
};

/// Running softmax of a warp: heads 8 n + 2 (lane % 4) + i. `top` is the shift of the exponents, `base` the same with 0
/// while nothing but -inf was seen; sums are those of this lane's slots.
template <int kNTiles>
struct RunningSoftmax {
  float top[kNTiles][2], base[kNTiles][2], sum[kNTiles][2];

  __device__ __forceinline__ RunningSoftmax() {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        top[n][i] = -INFINITY;
        base[n][i] = sum[n][i] = 0.0f;
      }
    }
  }

  /// Whether some logit of the warp is too large for the present shift.
  __device__ __forceinline__ bool exceeded(const float (&logit)[kNTiles][4]) const {
    bool above = false;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) above = above || fmaxf(logit[n][i], logit[n][i + 2]) > top[n][i] + kSlack;
    }
    return __any_sync(0xffffffffu, above);
  }

  /// Shifts by the largest logit so far; `shrink` is the factor for what was summed before.
  __device__ __forceinline__ void shift(const float (&logit)[kNTiles][4], float (&shrink)[kNTiles][2]) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float best = fmaxf(logit[n][i], logit[n][i + 2]);
#pragma unroll
        for (int offset = 4; offset <= 16; offset *= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, offset));
        best = fmaxf(best, top[n][i]);
        base[n][i] = finite_or_zero(best);
        shrink[n][i] = exp2_fast(top[n][i] - base[n][i]);
        top[n][i] = best;
        sum[n][i] *= shrink[n][i];
      }
    }
  }
};

/// A warp's state into shared memory, over the ring: all copies have landed and all warps are done reading. Ends with a
/// barrier.
template <class Shared, int kNTiles, int kChannelTiles>
__device__ __forceinline__ void store_states(Shared& shared, const RunningSoftmax<kNTiles>& softmax,
                                             const float (&out)[kChannelTiles][kNTiles][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    const int head = 8 * n + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = softmax.sum[n][i];
#pragma unroll
      for (int lanes = 4; lanes <= 16; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (lane < 4) {
        shared.top[warp][head + i] = softmax.top[n][i];
        shared.sum[warp][head + i] = sum;
      }
#pragma unroll
      for (int m = 0; m < kChannelTiles; ++m) {
        shared.out[warp][head + i][16 * m + lane / 4] = out[m][n][i];
        shared.out[warp][head + i][16 * m + lane / 4 + 8] = out[m][n][i + 2];
      }
    }
  }
  __syncthreads();
}

/// Attends over slots 0 .. count - 1 of key [.., Dk] and value [.., Dv]. Slots beyond are not read. `prepare` runs in
/// all threads once the first copies are under way; if it loads the query, it ends with __syncthreads.
template <class T, int kTile, int kHeads, int kRing, class OnScore = NoScores, class Prepare = NoPrepare>
__device__ __forceinline__ void attend_slice(SliceShared<T, kTile, kHeads, kRing>& shared, const T* key, const T* value,
                                             int count, int key_dim, int value_dim, float scale_log2,
                                             OnScore on_score = {}, Prepare prepare = {}) {
  using Shared = SliceShared<T, kTile, kHeads, kRing>;
  constexpr int kEntry = Shared::kEntry, kStride = Shared::kQueryStride, kNTiles = kHeads / 8, kSteps = kTile / 32;
  constexpr bool kKeepQuery = kTile * kHeads <= 2048;  // in registers
  // Steps of 32 channels that are read before the next copy starts, as far as registers go.
  constexpr int kAhead = kTile * kHeads <= 1024 ? kSteps : kTile * kHeads <= 2048 ? 2 : 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, offset = warp * kWarpSlots;
  const int groups = count > offset ? (count - offset + kSliceSlots - 1) / kSliceSlots : 0;
  T* const ring = shared.ring[warp][0];

  // Ring entries in turn: keys of the warp's group 0, its values, keys of group 1, ...
  const RowCopies<T, kTile> copies(lane);
  const auto load = [&](int entry, bool is_value, int place) {
    const int group = entry / 2;
    if (group < groups) {
      copies.issue(ring + place * kEntry, is_value ? value : key, is_value ? value_dim : key_dim,
                   group * kSliceSlots + offset, count);
    }
    cp_async_commit();  // an empty group keeps the count of groups in flight right
  };
  for (int entry = 0; entry < kRing - 1; ++entry) load(entry, entry % 2 == 1, entry);
  prepare();

  // Two steps of 16 channels at a time, all heads of a tile.
  const T* const query_row = shared.query + lane % 8 * kStride + lane / 8 * 8;
  uint32_t query[kKeepQuery ? kSteps : 1][kKeepQuery ? kNTiles : 1][4];
  if constexpr (kKeepQuery) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) ldmatrix_x4(query[k][n], query_row + 8 * n * kStride + 32 * k);
    }
  }
  const int key_at = ring_offset<kTile>(lane % 16, lane / 16);
  const int value_at = ring_offset<kTile>(lane / 16 * 8 + lane % 8, lane / 8 % 2);

  float out[kTile / 16][kNTiles][4] = {};  // [channel, head] tiles
  RunningSoftmax<kNTiles> softmax;
  int read = 0, write = kRing - 1;
  // Waits for the next entry; all lanes are done with the one before.
  const auto next_entry = [&] {
    cp_async_wait<kRing - 2>();
    __syncwarp();
    const int at = read * kEntry;
    read = read + 1 == kRing ? 0 : read + 1;
    return at;
  };
  // Starts the copy that overwrites the entry before the present one. It comes after the reads of the present entry,
  // which would queue behind it.
  const auto load_next = [&](int entry, bool is_value) {
    load(entry + kRing - 1, is_value, write);
    write = write + 1 == kRing ? 0 : write + 1;
  };

  for (int group = 0; group < groups; ++group) {
    // Scores [16 slots, heads] = keys * query^T; even and odd steps apart, to halve the chain of dependent products.
    const T* const keys = ring + next_entry();
    uint32_t even_a[kAhead][4], odd_a[kAhead][4];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      ldmatrix_x4(even_a[k], keys + chunks_on(key_at, 4 * k));
      ldmatrix_x4(odd_a[k], keys + chunks_on(key_at, 4 * k + 2));
    }
    load_next(2 * group, kRing % 2 == 0);
    float score[kNTiles][4] = {}, odd[kNTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        uint32_t b[4];
        if constexpr (kKeepQuery) {
#pragma unroll
          for (int i = 0; i < 4; ++i) b[i] = query[k][n][i];
        } else {
          ldmatrix_x4(b, query_row + 8 * n * kStride + 32 * k);
        }
        const uint32_t even_b[2] = {b[0], b[1]}, odd_b[2] = {b[2], b[3]};
        mma_16x8x16<T>(score[n], even_a[k % kAhead], even_b);
        mma_16x8x16<T>(odd[n], odd_a[k % kAhead], odd_b);
      }
      if (k + kAhead < kSteps) {
        ldmatrix_x4(even_a[k % kAhead], keys + chunks_on(key_at, 4 * (k + kAhead)));
        ldmatrix_x4(odd_a[k % kAhead], keys + chunks_on(key_at, 4 * (k + kAhead) + 2));
      }
    }
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] = (score[n][i] + odd[n][i]) * scale_log2;
    }

    // Running softmax; a lane holds slots lane / 4 and + 8 of two neighbouring heads.
    const int first = group * kSliceSlots + offset, slot = first + lane / 4;
    if (first + kWarpSlots > count) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[n][i] = slot + i / 2 * 8 < count ? score[n][i] : -INFINITY;
      }
    }
    if constexpr (!std::is_same_v<OnScore, NoScores>) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int my_slot = slot + i / 2 * 8;
          if (my_slot < count) on_score(my_slot, 8 * n + 2 * (lane % 4) + i % 2, score[n][i]);
        }
      }
    }
    if (softmax.exceeded(score)) {
      float shrink[kNTiles][2];
      softmax.shift(score, shrink);
#pragma unroll
      for (int m = 0; m < kTile / 16; ++m) {
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[m][n][i] *= shrink[n][i % 2];
        }
      }
    }
    uint32_t weight[kNTiles][2];
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] = exp2_fast(score[n][i] - softmax.base[n][i % 2]);
#pragma unroll
      for (int i = 0; i < 2; ++i) softmax.sum[n][i] += score[n][i] + score[n][i + 2];
      // [slot, head] in registers becomes the [slot, head] operand of the next product, which wants it transposed.
      weight[n][0] = transpose_8x8(pack2<T>(score[n][0], score[n][1]));
      weight[n][1] = transpose_8x8(pack2<T>(score[n][2], score[n][3]));
    }

    // out^T [channels, heads] += values^T * weights^T.
    const T* const values = ring + next_entry();
    uint32_t a[2 * kAhead][4];
#pragma unroll
    for (int m = 0; m < 2 * kAhead; ++m) ldmatrix_x4_trans(a[m], values + chunks_on(value_at, 2 * m));
    load_next(2 * group + 1, kRing % 2 == 1);
#pragma unroll
    for (int m = 0; m < kTile / 16; ++m) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) mma_16x8x16<T>(out[m][n], a[m % (2 * kAhead)], weight[n]);
      if (m + 2 * kAhead < kTile / 16)
        ldmatrix_x4_trans(a[m % (2 * kAhead)], values + chunks_on(value_at, 2 * (m + 2 * kAhead)));
    }
  }

  cp_async_wait<0>();
  __syncthreads();
  store_states(shared, softmax, out);
}

}  // namespace uncomp::kernels
