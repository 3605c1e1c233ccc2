// SPDX-License-Identifier: Apache-2.0
// How a warp moves whole tokens: the width of one access and how many lanes share a token.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/math.h"

namespace uncomp {

/// Widest power of two up to 16 that divides all of `numbers` (addresses, strides and sizes in bytes).
constexpr int32_t common_lane_bytes(std::initializer_list<int64_t> numbers) {
  int32_t lane = 16;
  for (const int64_t n : numbers) {
    while (n % lane != 0) lane /= 2;
  }
  return lane;
}

/// Tokens of one pass of a warp. A token takes `lanes()` lanes, the smallest power of two that covers it (a longer
/// one takes several accesses), so 32 / lanes() tokens lie side by side and `kInFlight` such rows are loaded before
/// the first is stored.
struct WarpTokens {
  static constexpr int32_t kLogInFlight = 2, kInFlight = 1 << kLogInFlight;
  int32_t log_lanes;

  static constexpr WarpTokens of(int32_t token_bytes, int32_t lane_bytes) {
    int32_t log_lanes = 0;
    while (log_lanes < 5 && (1 << log_lanes) * lane_bytes < token_bytes) ++log_lanes;
    return {log_lanes};
  }
  UNCOMP_HD constexpr int32_t lanes() const { return 1 << log_lanes; }
  UNCOMP_HD constexpr int32_t side_by_side() const { return 32 >> log_lanes; }
  UNCOMP_HD constexpr int32_t per_pass() const { return kInFlight * side_by_side(); }
  /// Passes over `count` tokens.
  UNCOMP_HD constexpr uint32_t passes(int32_t count) const {
    return (static_cast<uint32_t>(count) + per_pass() - 1) >> (kLogInFlight + 5 - log_lanes);
  }
  /// Token of a pass that `lane` moves in its access number `flight`; neighbours in memory lie in one access.
  UNCOMP_HD constexpr int32_t token(int32_t lane, int32_t flight) const {
    return flight * side_by_side() + (lane >> log_lanes);
  }
  /// Place of `lane` among the lanes of its token.
  UNCOMP_HD constexpr int32_t place(int32_t lane) const { return lane & (lanes() - 1); }
};

}  // namespace uncomp
