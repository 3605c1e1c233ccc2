// SPDX-License-Identifier: Apache-2.0
// Truncated matrix entropy of one spectrum, from sums that may be made in any grouping of the eigenvalues.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/math.h"

namespace uncomp {

/// How a spectrum becomes a number.
enum class EntropyKind : int32_t { truncated, renormalized, renyi2 };

/// Sums over the eigenvalues that enter; negative ones count as 0, NaN stays NaN.
template <class T>
struct EntropySums {
  T share = T(0);    // sum of s
  T log_sum = T(0);  // sum of s ln s, 0 ln 0 = 0
  T square = T(0);   // sum of s^2

  UNCOMP_HD void add(T s) {
    if (s <= T(0)) return;
    share += s;
    log_sum += s * std::log(s);
    square += s * s;
  }
};

/// H in nats; 0 where there is no mass.
template <class T>
UNCOMP_HD inline T entropy_of(const EntropySums<T>& sums, EntropyKind kind) {
  if (sums.share == T(0)) return T(0);
  switch (kind) {
    case EntropyKind::renormalized:  // - sum (s / c) ln (s / c) with c = sum s
      return std::log(sums.share) - sums.log_sum / sums.share;
    case EntropyKind::renyi2:
      return T(0) - std::log(sums.square);
    case EntropyKind::truncated:
      break;
  }
  return T(0) - sums.log_sum;
}

}  // namespace uncomp
