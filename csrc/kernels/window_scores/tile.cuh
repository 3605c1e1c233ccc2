// SPDX-License-Identifier: Apache-2.0
// What the three kernels share: a warp holds the keys of its tile in registers, queries lie in shared memory, and
// each 16 queries are multiplied with all keys of the warp. Channels behind head_dim are zero-filled.
//
// A warp owns its part of the key buffer alone, so the stream of keys needs no block barrier: wait for the copy,
// move it to registers, start the next copy into the same place, compute.
#pragma once

#include <cstdint>

#include "core/window.h"
#include "kernels/common/mma.cuh"
#include "kernels/common/types.cuh"

namespace uncomp::kernels {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kInf = __builtin_huge_valf();

/// 2^x in one instruction: 0 for -inf, NaN for NaN.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The larger one; NaN wins.
__device__ __forceinline__ float max_or_nan(float a, float b) { return b > a || b != b ? b : a; }

/// Joins the result of one chunk of heads with what earlier chunks left.
__device__ __forceinline__ float join_chunks(Reduce reduce, float earlier, float now) {
  return reduce == Reduce::max ? max_or_nan(earlier, now) : earlier + now;
}

/// Sum over the four lanes that hold the columns of one matrix row.
template <class V>
__device__ __forceinline__ V quad_sum(V x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  x += __shfl_xor_sync(0xffffffffu, x, 2);
  return x;
}

/// Running log-sum-exp in powers of two: sum 2^x = total * 2^max. Nothing seen: (-inf, 0). A NaN or +inf among the
/// terms makes the total NaN.
struct LogSum {
  float max, total;

  __device__ __forceinline__ void join(const LogSum& other) {
    const float joint = fmaxf(max, other.max);
    const float zero = joint == -kInf ? 0.0f : joint;  // -inf − -inf would be NaN
    total = total * exp2_fast(max - zero) + other.total * exp2_fast(other.max - zero);
    max = joint;
  }
};

template <class T, int kTile>
struct Tile {
  static constexpr int kPieces = kTile / 8;       // 16-byte pieces of a row
  static constexpr int kSteps = kTile / 16;       // k16 products of a row
  static constexpr int kKeys = warp_keys(kTile);  // of a warp
  static constexpr int kKeyTiles = kKeys / 16;    // m16 tiles of them
  static constexpr int kMaxQueries = max_block_queries(kTile);
  static constexpr size_t kKeyBytes = size_t{kWindowWarps} * kKeys * kTile * sizeof(T);  // of a block

  using Fragment = uint32_t[4];
  /// Keys in registers. As the first operand (16 keys) a fragment is used whole; as the second operand its registers
  /// 0 and 2 are keys 0..7 and registers 1 and 3 keys 8..15.
  using Keys = Fragment[kKeyTiles][kSteps];

  /// Starts the copy of tokens first .. first + kKeys - 1 of a row into the warp's buffer; zeros from `end` on.
  static __device__ __forceinline__ void copy_keys(T* shared, const T* row, int64_t stride, int32_t first, int32_t end,
                                                   int32_t head_dim) {
    constexpr int kRowsAtOnce = 32 / kPieces;
    // Opaque here, so that multiples of the stride are made for each tile instead of held in registers meanwhile.
    asm volatile("" : "+l"(stride));
    const int lane = threadIdx.x % 32, piece = lane % kPieces;
    const bool channels = piece * 8 < head_dim;
    const T* from = row + (first + lane / kPieces) * stride + piece * 8;
#pragma unroll
    for (int r = 0; r < kKeys; r += kRowsAtOnce) {
      const int key = r + lane / kPieces;
      const bool live = channels && first + key < end;
      cp_async16(shared + key * kTile + swizzled(key, piece) * 8, live ? from : row, live);
      from += kRowsAtOnce * stride;
    }
  }

  /// Starts the copy of `count` packed queries into the block's buffer; `place(q)` is query q's row or null for zeros.
  template <class Place>
  static __device__ __forceinline__ void copy_queries(T* shared, int32_t count, const T* any, int32_t head_dim,
                                                      Place place) {
    for (int32_t i = threadIdx.x; i < count * kPieces; i += kWindowThreads) {
      const int32_t q = i / kPieces, piece = i % kPieces;
      const T* from = place(q);
      const bool live = from != nullptr && piece * 8 < head_dim;
      cp_async16(shared + q * kTile + swizzled(q, piece) * 8, live ? from + piece * 8 : any, live);
    }
  }

  /// 16 rows x 16 channels from shared memory: registers 0, 1 are rows 0..7 and 8..15 of channels 0..7, registers
  /// 2, 3 the same rows of channels 8..15.
  static __device__ __forceinline__ void load_fragment(Fragment& fragment, const T* shared, int row0, int step) {
    const int lane = threadIdx.x % 32, row = row0 + lane % 16;
    ldmatrix_x4(fragment, shared + row * kTile + swizzled(row, 2 * step + lane / 16) * 8);
  }

  static __device__ __forceinline__ void load_keys(Keys& keys, const T* shared) {
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load_fragment(keys[m][k], shared, 16 * m, k);
    }
  }

  /// Products of 16 packed queries (rows) with the warp's keys (columns): product[t][0], [1] are query lane / 4 and
  /// keys 8 t + 2 (lane % 4) and + 1; [2], [3] query lane / 4 + 8.
  static __device__ __forceinline__ void queries_times_keys(float (&product)[2 * kKeyTiles][4], const T* queries,
                                                            int q0, const Keys& keys) {
#pragma unroll
    for (int t = 0; t < 2 * kKeyTiles; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) product[t][e] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Fragment q;
      load_fragment(q, queries, q0, k);
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
        const uint32_t low[2] = {keys[m][k][0], keys[m][k][2]}, high[2] = {keys[m][k][1], keys[m][k][3]};
        mma_16x8x16<T>(product[2 * m], q, low);
        mma_16x8x16<T>(product[2 * m + 1], q, high);
      }
    }
  }

  /// Products of the warp's keys (rows) with 16 packed queries (columns): product[h][m][0], [1] are key 16 m +
  /// lane / 4 and queries 8 h + 2 (lane % 4) and + 1; [2], [3] key 16 m + lane / 4 + 8.
  static __device__ __forceinline__ void keys_times_queries(float (&product)[2][kKeyTiles][4], const T* queries, int q0,
                                                            const Keys& keys) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) product[h][m][e] = 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Fragment q;
      load_fragment(q, queries, q0, k);
      const uint32_t low[2] = {q[0], q[2]}, high[2] = {q[1], q[3]};
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
        mma_16x8x16<T>(product[0][m], keys[m][k], low);
        mma_16x8x16<T>(product[1][m], keys[m][k], high);
      }
    }
  }
};

}  // namespace uncomp::kernels
