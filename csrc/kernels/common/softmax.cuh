// SPDX-License-Identifier: Apache-2.0
// Softmax states in log2 units: the largest logit `top`, the sum of exp2(logit - top), and an output that is divided
// by that sum at the very end. A state that has seen nothing is (-inf, 0, 0).
#pragma once

#include <cuda_runtime.h>

namespace uncomp::kernels {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

/// A shift for exponents: -inf (nothing seen yet) would give inf - inf.
__device__ __forceinline__ float finite_or_zero(float top) { return top == -INFINITY ? 0.0f : top; }

/// 2^x in one instruction; results below the smallest normal number are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Natural log-sum-exp; -inf where nothing was seen.
__device__ __forceinline__ float log_sum_exp(float top, float sum) {
  return sum == 0.0f ? -INFINITY : (top + log2f(sum)) * kLn2;
}

/// The weighted mean; 0 where nothing was seen.
__device__ __forceinline__ float normalised(float out, float sum) { return sum == 0.0f ? 0.0f : out / sum; }

}  // namespace uncomp::kernels
