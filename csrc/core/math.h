// SPDX-License-Identifier: Apache-2.0
// Small integer arithmetic shared by host and device.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define UNCOMP_HD __host__ __device__
#else
#define UNCOMP_HD
#endif

namespace uncomp {

template <class T>
UNCOMP_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
UNCOMP_HD constexpr T round_up(T a, T multiple) {
  return ceil_div(a, multiple) * multiple;
}

template <class T>
UNCOMP_HD constexpr T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}

template <class T>
UNCOMP_HD constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}

template <class T>
UNCOMP_HD constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

/// True when `x` fits into `To` without loss.
template <class To>
constexpr bool fits(int64_t x) {
  return x >= static_cast<int64_t>(std::numeric_limits<To>::min()) &&
         x <= static_cast<int64_t>(std::numeric_limits<To>::max());
}

}  // namespace uncomp
