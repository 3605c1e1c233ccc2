// SPDX-License-Identifier: Apache-2.0
// What selecting tokens rests on: fp32 scores as unsigned keys of the same order, pooling over neighbours, and which
// columns of a row compete. Host and device share every rule, so they choose the same tokens bit for bit.
#pragma once

#include <bit>
#include <cstdint>

#include "core/dtype.h"
#include "core/math.h"

namespace uncomp {

UNCOMP_HD constexpr bool is_nan_bits(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

/// fp32 bits as a key of the same order; -0 equals +0. Numbers get keys in [0x007fffff, 0xff800000].
UNCOMP_HD constexpr uint32_t number_key(uint32_t bits) {
  if (bits == 0x80000000u) bits = 0;
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

/// Key for choosing the largest: NaN is below every number.
UNCOMP_HD constexpr uint32_t select_key(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return is_nan_bits(bits) ? 0u : number_key(bits);
}

/// Key for ranking upwards: NaN is above every number.
UNCOMP_HD constexpr uint32_t rank_key(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return is_nan_bits(bits) ? 0xffffffffu : number_key(bits);
}

/// Sum and quotient rounded once each: no contraction, no approximate division.
UNCOMP_HD inline float add_rounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

UNCOMP_HD inline float divide_rounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

/// What a column outside adds to a pool: nothing.
UNCOMP_HD constexpr float pool_nothing(Pool mode) {
  return mode == Pool::max ? std::bit_cast<float>(0x7fc00000u) : 0.0f;
}

/// Larger of both; NaN only where both are.
UNCOMP_HD inline float larger_number(float a, float b) {
#ifdef __CUDA_ARCH__
  return fmaxf(a, b);
#else
  return b > a || a != a ? b : a;
#endif
}

/// Key of a finished pool of `width` columns.
UNCOMP_HD inline uint32_t pool_key(float pool, int32_t width, Pool mode) {
  return select_key(mode == Pool::max ? pool : divide_rounded(pool, static_cast<float>(width)));
}

/// Key of the pooled score of `column` over its neighbours up to `half` away inside [0, end); `load(c)` gives the score
/// of column c. max: NaN counts only where all neighbours are NaN. avg: columns outside count 0, the divisor is the
/// width, the sum runs upwards, and a NaN makes the average NaN.
template <class Load>
UNCOMP_HD uint32_t pooled_key(const Load& load, int32_t column, int32_t half, int32_t end, Pool mode) {
  const int32_t from = max_of(column - half, 0), to = min_of(column + half + 1, end);
  float pool = pool_nothing(mode);
  for (int32_t c = from; c < to; ++c) {
    pool = mode == Pool::max ? larger_number(pool, load(c)) : add_rounded(pool, load(c));
  }
  return pool_key(pool, 2 * half + 1, mode);
}

/// Which columns of a row stay whatever their score, and how many of the others.
struct SelectRow {
  int32_t tokens;      // n: columns 0 .. n - 1 are tokens
  int32_t keep;        // tokens that stay
  int32_t head, tail;  // first and last tokens that stay in any case
  int32_t need;        // tokens chosen among columns [head, n - tail); 0 when nothing is left to choose
};

/// Clamps a row's numbers: n to [0, columns], keep to [min(sink + window, n), n]. sink, window >= 0.
UNCOMP_HD constexpr SelectRow select_row(int32_t length, int32_t keep_len, int32_t columns, int32_t sink,
                                         int32_t window) {
  const int32_t n = clamp(length, 0, columns);
  const int64_t fixed = min_of<int64_t>(int64_t{sink} + window, n);
  const int32_t keep = static_cast<int32_t>(clamp<int64_t>(keep_len, fixed, n));
  if (keep == n) return {n, n, n, 0, 0};
  return {n, keep, sink, window, keep - sink - window};
}

}  // namespace uncomp
