// SPDX-License-Identifier: Apache-2.0
// Parts of the Gram kernel of sm_90a: its shared memory, a block's pieces of heads, a tile's way from states to unit
// tokens, and the order of the numbers in a warpgroup's accumulators.
#pragma once

#include "core/gram.h"
#include "kernels/common/types.cuh"
#include "kernels/matrix_spectrum/rows.cuh"
#include "kernels/matrix_spectrum/unit_token.cuh"

namespace uncomp::kernels {

inline constexpr int kGroupThreads = 128;
inline constexpr int kGroups = 2;  // warpgroups that compute
inline constexpr int kComputeThreads = kGroups * kGroupThreads;
inline constexpr int kThreads = kComputeThreads + kGroupThreads;
// Registers of a thread that computes and of one that copies; a block starts with 168 for each.
inline constexpr int kComputeRegisters = 216, kCopyRegisters = 40;
static_assert(kComputeRegisters * kComputeThreads + kCopyRegisters * kGroupThreads <= 65536);

/// Lower triangle in the accumulators of a warpgroup: 64 x 64, above 64 x 128 where a tile has 128 channels. A vector
/// is four numbers of a thread, rows r, r, r + 8, r + 8 of columns c, c + 1, c, c + 1.
template <int kTile>
struct FragmentPlan {
  static constexpr int kVectors = kTile == 64 ? 8 : 24;
  static constexpr int kMatrixVectors = kVectors * kGroupThreads;
};

/// Vector `v` of a thread to both triangles of a matrix whose rows are kPitch numbers apart.
template <int kTile, int kPitch = kTile>
__device__ __forceinline__ void put_fragment(float* to, int v, int thread, const float4& x) {
  const int row = (v < 8 ? 0 : 64) + thread / 32 * 16 + thread % 32 / 4,
            column = (v < 8 ? v : v - 8) * 8 + thread % 4 * 2;
  const auto put = [&](int r, int c, float y) {
    if (c > r) return;
    to[r * kPitch + c] = y;
    to[c * kPitch + r] = y;
  };
  put(row, column, x.x);
  put(row, column + 1, x.y);
  put(row + 8, column, x.z);
  put(row + 8, column + 1, x.w);
}

template <int kTile>
struct StreamShape {
  static constexpr int kPanels = kTile / 64;    // of 64 channels
  static constexpr int kTokens = 64 / kPanels;  // of a tile
  static constexpr int kOwn = kTokens / 16;     // tokens of a tile that a thread meets: one in four of its warp's
  static constexpr int kPanelBytes = kTokens * 128;
  static constexpr int kStageBytes = kPanels * kPanelBytes;
  static constexpr int kStages = 18;
  static constexpr int kVectors = FragmentPlan<kTile>::kVectors;
  // Shared memory: ring, low parts of a tile for each group, sums over groups, mean and its parts, barriers.
  static constexpr int kLow = kStages * kStageBytes;
  static constexpr int kSums = kLow + kGroups * kStageBytes;
  static constexpr int kMean = kSums + kVectors * kGroupThreads * 16;
  static constexpr int kParts = 4 * kComputeThreads / kTile;  // of a channel's sum
  static constexpr int kBarriers = kMean + (1 + kParts) * kTile * 4 + 24;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  static_assert(kOwn % 2 == 0 && kPanelBytes % 1024 == 0 && kStages % kGroups == 0 && kSharedBytes <= 227 * 1024);
};

__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}

/// Over all warpgroups that compute.
__device__ __forceinline__ void compute_barrier() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(kGroups + 1), "n"(kComputeThreads) : "memory");
}

/// Shared memory by its address, which is all that stays in a register.
__device__ __forceinline__ void store_chunk(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

/// 8 channels of a tile that is not yet scaled.
template <bool kBfloat>
__device__ __forceinline__ void load_chunk(uint32_t address, float* x) {
  RawChannels<false> raw;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(raw.word[0]), "=r"(raw.word[1]), "=r"(raw.word[2]), "=r"(raw.word[3])
               : "r"(address)
               : "memory");
  float y[kLaneChannels];
  unpack_channels<false>(raw, kBfloat, y);
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) x[j] = y[j];
}

__device__ __forceinline__ uint4 pack(const float* x) {
  return make_uint4(pack2<__half>(x[0], x[1]), pack2<__half>(x[2], x[3]), pack2<__half>(x[4], x[5]),
                    pack2<__half>(x[6], x[7]));
}

/// Two centred tokens of 8 neighbouring lanes each, scaled to length 16 or zeroed. The lower four lanes look after
/// token 0, the upper four after token 1, and `alive` tells whether theirs is real.
template <int kCount>
__device__ __forceinline__ void unit_tokens(float (&d)[2][kCount], float near_mean, bool alive, bool upper) {
  const auto length_square = [&] {
    float square[2] = {};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) square[u] += d[u][j] * d[u][j];
    }
    float mine = upper ? square[1] : square[0];
    mine += __shfl_xor_sync(kFullWarp, upper ? square[0] : square[1], 4);
    mine += __shfl_xor_sync(kFullWarp, mine, 2);
    return mine + __shfl_xor_sync(kFullWarp, mine, 1);
  };
  float square = length_square();
  const bool extreme = alive && extreme_square(square);
  if (__any_sync(kFullWarp, extreme)) {
    const float scale = !extreme ? 1.0f : (square < 1.0f ? kUp : kDown);
    const float other = __shfl_xor_sync(kFullWarp, scale, 4);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      d[0][j] *= upper ? other : scale;
      d[1][j] *= upper ? scale : other;
    }
    near_mean *= scale;
    square = length_square();
  }
  float inverse;  // a square below the normal range is zero here
  asm("rsqrt.approx.ftz.f32 %0, %1;\n" : "=f"(inverse) : "f"(square));
  const bool zero = !alive || square == 0.0f || square * inverse <= near_mean;
  const float factor = zero ? 0.0f : inverse * kUnitLength;
  const float other = __shfl_xor_sync(kFullWarp, factor, 4);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    d[0][j] *= upper ? other : factor;
    d[1][j] *= upper ? factor : other;
  }
}

/// Values that follow from `x` are computed anew behind this point and occupy no registers before it.
__device__ __forceinline__ uint32_t anew(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

/// This block's piece that starts at `at`, in tokens.
struct Piece : LinePiece {
  int32_t count, begin, end;  // tokens of the head, and the piece's
};

__device__ __forceinline__ int32_t block_begin(const MatrixSpectrumParams& params, int32_t head_tiles, uint32_t block) {
  return line_begin(int64_t{params.batch} * params.heads * head_tiles, gridDim.x, block);
}

__device__ __forceinline__ Piece piece_at(const MatrixSpectrumParams& params, int32_t head_tiles, int32_t at) {
  Piece piece{line_piece(head_tiles, at, block_begin(params, head_tiles, anew(blockIdx.x) + 1)), 0, 0, 0};
  piece.count = params.tokens.count(piece.matrix / params.heads);
  piece.begin = line_token(piece.count, piece.from, head_tiles);
  piece.end = line_token(piece.count, piece.to, head_tiles);
  return piece;
}

}  // namespace uncomp::kernels
