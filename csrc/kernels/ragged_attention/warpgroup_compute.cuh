// SPDX-License-Identifier: Apache-2.0
// What a computing warpgroup of the sm_90a path does with a tile of keys: scores, running softmax, weighted values.
// Score registers are laid out as in mma.sync: row lane / 4 (+ 8), columns 8 * n + 2 * (lane % 4) and the next.
#pragma once

#include "kernels/common/softmax.cuh"
#include "kernels/ragged_attention/warpgroup_block.cuh"
#include "kernels/ragged_attention/wgmma.cuh"

namespace uncomp::kernels {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/// Named barriers: one for each warpgroup alone, one for each one's turn at the matrix unit.
inline constexpr int kAloneBarrier = 1, kTurnBarrier = 1 + kMostGroups;

/// Two packed queries of a thread: the largest raw score and the sum of weights so far.
struct RowPair {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
};

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

/// score[64 queries, keys] = queries * keys.
template <class T, int kDim, int kCount>
__device__ __forceinline__ void multiply_keys(float (&score)[kCount], uint32_t query, uint32_t keys) {
  const uint64_t a = rows_operand(query), b = rows_operand(keys);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    product_rows<T>(score, operand_at(a, k / 4 * kGroupQueries * kPanelRowBytes + k % 4 * 32),
                    operand_at(b, k / 4 * 2 * kCount * kPanelRowBytes + k % 4 * 32), k > 0);
  }
}

/// out[64 queries, channels] += weights * values.
template <class T, int kKeys, int kPieces, int kCount>
__device__ __forceinline__ void multiply_values(float (&out)[kPieces][kCount], const uint32_t (&weight)[kKeys / 16][4],
                                                uint32_t values) {
  constexpr uint32_t kPanelBytes = kKeys * kPanelRowBytes;
  const uint64_t b = columns_operand(values, kPanelBytes);
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      product_columns<T>(out[piece], weight[k],
                         operand_at(b, k * 16 * kPanelRowBytes + piece * (2 * kCount / kPanelWidth) * kPanelBytes));
    }
  }
}

/// What a query does not see becomes -inf.
template <int kCount>
__device__ __forceinline__ void hide_keys(float (&score)[kCount], const int32_t (&seen)[2]) {
  const int column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int n = 0; n < kCount / 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * n + i % 2 + column >= seen[i / 2]) score[4 * n + i] = -INFINITY;
    }
  }
}

/// Scores become weights; `shrink` is what the output so far is multiplied by. `scale` > 0, in log2 units.
template <int kCount>
__device__ __forceinline__ void soften(float (&score)[kCount], RowPair& state, float (&shrink)[2], float scale) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float best = fmaxf(score[2 * i], score[2 * i + 1]);
#pragma unroll
    for (int n = 1; n < kCount / 4; ++n) best = fmaxf(best, fmaxf(score[4 * n + 2 * i], score[4 * n + 2 * i + 1]));
    best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 1));
    best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 2));
    best = fmaxf(best, state.top[i]);
    const float base = finite_or_zero(best) * scale;
    shrink[i] = fast_exp2(state.top[i] * scale - base);
    state.top[i] = best;
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n) {
      float& x = score[4 * n + 2 * i];
      float& y = score[4 * n + 2 * i + 1];
      x = fast_exp2(fmaf(x, scale, -base));
      y = fast_exp2(fmaf(y, scale, -base));
      low += x;
      high += y;
    }
    state.sum[i] = state.sum[i] * shrink[i] + (low + high);
  }
}

/// The weights, rounded; their registers are already in the order of the next product's operand.
template <class T, int kCount>
__device__ __forceinline__ void pack_weights(uint32_t (&weight)[kCount / 8][4], const float (&score)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount / 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weight[k][i] = pack2<T>(score[8 * k + 2 * i], score[8 * k + 2 * i + 1]);
  }
}

/// Dead values may be NaN, so they become zero. Every warpgroup does all of them: no one waits for another.
template <int kDim>
__device__ __forceinline__ void clear_dead_values(unsigned char* slot, int32_t live, int group) {
  constexpr int kKeys = warpgroup_keys(kDim), kChunks = kDim / 8;
  for (int i = live * kChunks + threadIdx.x % kGroupThreads; i < kKeys * kChunks; i += kGroupThreads) {
    *reinterpret_cast<uint4*>(slot + chunk_offset(i / kChunks, i % kChunks, kKeys)) = make_uint4(0, 0, 0, 0);
  }
  publish_to_products();
  meet_warps(kAloneBarrier + group, kGroupThreads);
}
#endif

}  // namespace uncomp::kernels
