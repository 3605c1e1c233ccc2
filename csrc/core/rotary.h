// SPDX-License-Identifier: Apache-2.0
// Rotary angles as integers. Parts of a full turn in fixed point, multiplied by a position modulo a power of two, wrap
// round exactly; position * frequency in float32 is wrong by 0.01 radians at 128K tokens.
#pragma once

#include <cmath>
#include <cstdint>

namespace uncomp {

inline constexpr double kRadiansOfTurn = 6.283185307179586476925286766559;

/// A finite frequency, radians a token, as parts of 2^64 of a full turn a token. Times a position, modulo 2^64, it is
/// the angle.
inline uint64_t turn64(double frequency) {
  const double turns = frequency / kRadiansOfTurn, part = turns - std::floor(turns);
  return part < 1.0 ? static_cast<uint64_t>(std::ldexp(part, 64)) : 0;
}

}  // namespace uncomp
