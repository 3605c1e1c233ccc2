// SPDX-License-Identifier: Apache-2.0
// Run-time value to compile-time constant. A value that is not listed is refused, never rounded to a neighbour.
#pragma once

#include <type_traits>
#include <utility>

#include "core/constants.h"

namespace uncomp {

template <int V>
using Int = std::integral_constant<int, V>;

/// Calls `f(Int<V>{})` for the V of `Vs` that equals `value` and returns true; false when none does.
template <int... Vs, class F>
bool dispatch_int(int value, F&& f) {
  return ((value == Vs ? (f(Int<Vs>{}), true) : false) || ...);
}

/// Smallest head-dim tile that holds `dim` channels, 0 when none does.
constexpr int head_dim_tile(int dim) {
  for (int tile : kHeadDimTiles) {
    if (dim <= tile) return tile;
  }
  return 0;
}

}  // namespace uncomp
