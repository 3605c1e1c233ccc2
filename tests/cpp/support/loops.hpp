// SPDX-License-Identifier: Apache-2.0
// Numbers in any dtype for tests of the CPU loops, and every copy of the loops that this machine runs.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/loops.h"

namespace uncomp::test {

/// The number that the 16 bits of a half or bfloat16 stand for, from the definition of the formats.
inline double decoded16(uint16_t bits, DType dtype) {
  const int fraction_bits = dtype == DType::float16 ? 10 : 7, top = dtype == DType::float16 ? 31 : 255;
  const int fraction = bits & ((1 << fraction_bits) - 1), exponent = bits >> fraction_bits & top;
  const double sign = bits & 0x8000 ? -1.0 : 1.0, share = std::ldexp(fraction, -fraction_bits);
  if (exponent == top) {
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  const int bias = top / 2;
  return sign * (exponent == 0 ? std::ldexp(share, 1 - bias) : std::ldexp(1.0 + share, exponent - bias));
}

/// Random numbers below 2 in memory and in double precision.
struct Numbers {
  std::vector<unsigned char> bytes;
  std::vector<double> value;

  Numbers(size_t count, DType dtype, uint32_t seed) : bytes(count * dtype_bytes(dtype)), value(count) {
    std::mt19937 random(seed);
    for (size_t i = 0; i < count; ++i) {
      const float number = std::uniform_real_distribution<float>(-2.0f, 2.0f)(random);
      uint16_t half = static_cast<uint16_t>(random());
      half &= dtype == DType::float16 ? 0xbfff : 0x807f;  // below 2
      half |= dtype == DType::float16 ? 0x3000 : 0x3f00;
      const void* from = dtype == DType::float32 ? static_cast<const void*>(&number) : &half;
      std::memcpy(&bytes[i * dtype_bytes(dtype)], from, dtype_bytes(dtype));
      value[i] = dtype == DType::float32 ? number : decoded16(half, dtype);
    }
  }
};

inline std::vector<float> random_floats(size_t count, float low, float high, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> any(low, high);
  std::vector<float> numbers(count);
  for (float& x : numbers) x = any(random);
  return numbers;
}

inline std::vector<std::pair<std::string, const cpu::Loops*>> copies() {
  std::vector<std::pair<std::string, const cpu::Loops*>> found;
  for (const auto& [name, set] : {std::pair{"baseline", cpu::InstructionSet::baseline},
                                  {"avx2", cpu::InstructionSet::avx2},
                                  {"avx512", cpu::InstructionSet::avx512}}) {
    if (const cpu::Loops* loops = cpu::loops_for(set)) found.emplace_back(name, loops);
  }
  return found;
}

inline constexpr DType kDTypes[] = {DType::float32, DType::float16, DType::bfloat16};

}  // namespace uncomp::test
