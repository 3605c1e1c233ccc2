// SPDX-License-Identifier: Apache-2.0
// What every Gram kernel agrees on: the scale of unit tokens, when a token counts as equal to the mean, when half
// precision needs a second part.
#pragma once

#include "kernels/common/reduce.cuh"

namespace uncomp::kernels {

/// Length of a token in the tensor cores: keeps its channels away from the subnormal range.
inline constexpr float kUnitLength = 16.0f;
/// Squares of lengths inside this range are exact enough as they are; others are computed again at another scale.
inline constexpr float kSmallSquare = 1e-30f, kLargeSquare = 1e30f;
inline constexpr float kUp = 0x1p96f, kDown = 0x1p-96f;
/// A token whose distance from the mean is at most this share of the mean's length adds nothing. Where that holds, the
/// token is as long as the mean, so this is the share of the token's own length too.
inline constexpr float kNearMean = 1e-5f;
/// Up to so many tokens one half-precision part is not enough: its rounding averages out over tokens only slowly.
inline constexpr int32_t kFewTokens = 1024;

__device__ __forceinline__ bool extreme_square(float square) {
  return !(square >= kSmallSquare && square <= kLargeSquare);
}

/// Distance from the mean up to which a token is equal to it; at most one large channel decides the scale. Every warp
/// computes it alike.
template <int kTile>
__device__ float near_mean_length(const float* mean, int lane) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kTile / 32; ++i) largest = fmaxf(largest, fabsf(mean[lane + 32 * i]));
  largest = warp_max(largest);
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < kTile / 32; ++i) {
    const float share = largest > 0.0f ? mean[lane + 32 * i] / largest : 0.0f;
    square += share * share;
  }
  const float length = kNearMean * largest * sqrtf(warp_sum(square));
  return length < INFINITY ? length : -1.0f;  // no token is near a mean that is no number
}

}  // namespace uncomp::kernels
