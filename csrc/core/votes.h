// SPDX-License-Identifier: Apache-2.0
// Votes as fixed-point integers: sums over the vote ring are exact, whatever order they are made in, for ever.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace uncomp {

/// Fraction bits s of a vote: an attention weight a in [0, 1] is stored as round(a * 2^s). The largest s for which a
/// sum of `vote_window` votes of 1.0 keeps a spare bit below 2^31: s = 30 - ceil(log2(vote_window)). A running sum is
/// updated by (new - old), never by adding first: at a window of 1 that would pass 2^31.
UNCOMP_HD constexpr int32_t vote_scale_bits(int32_t vote_window) {
  int32_t log2_ceil = 0;
  while (log2_ceil < 30 && (int32_t{1} << log2_ceil) < vote_window) ++log2_ceil;
  return 30 - log2_ceil;
}

/// round(weight * 2^bits), halves upwards, clamped to [0, 2^bits]; NaN gives 0. Only exact float operations, so host
/// and device agree to the bit.
UNCOMP_HD constexpr int32_t quantize_vote(float weight, int32_t bits) {
  const int32_t one = int32_t{1} << bits;
  if (!(weight > 0.0f)) return 0;
  if (weight >= 1.0f) return one;
  const float scaled = weight * static_cast<float>(one);
  const int32_t whole = static_cast<int32_t>(scaled);
  return whole + (scaled - static_cast<float>(whole) >= 0.5f ? 1 : 0);
}

/// The running sum once `fresh` has replaced `old`. Unsigned, so that a state that is no sum of votes wraps instead of
/// being undefined.
UNCOMP_HD constexpr int32_t moved_sum(int32_t sum, int32_t old, int32_t fresh) {
  return static_cast<int32_t>(static_cast<uint32_t>(sum) + (static_cast<uint32_t>(fresh) - static_cast<uint32_t>(old)));
}

/// The weight that a stored vote, or a sum of votes, stands for.
UNCOMP_HD constexpr float vote_weight(int32_t vote, int32_t bits) {
  return static_cast<float>(vote) / static_cast<float>(int32_t{1} << bits);
}

}  // namespace uncomp
