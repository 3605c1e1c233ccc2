// SPDX-License-Identifier: Apache-2.0
// Keys made again from latents: every copy of the loops against sums and angles in double precision.
#include <cmath>

#include "core/rotary.h"
#include "support/catch.hpp"
#include "support/loops.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

struct Options {
  bool bias, norm;
  float rotary_scale = 1.0f;
  int32_t offset = 0;
};

void check(const cpu::Loops& loops, DType dtype, int32_t count, int32_t rank, int32_t dim, int32_t pairs,
           const Options& options) {
  CAPTURE(count, rank, dim, pairs, options.bias, options.norm);
  const Numbers latents(static_cast<size_t>(count) * rank, dtype, 1);
  const std::vector<float> basis = random_floats(static_cast<size_t>(rank) * dim, -0.3f, 0.3f, 2);
  const std::vector<float> bias = random_floats(dim, -1.0f, 1.0f, 3), norm = random_floats(dim, 0.5f, 1.5f, 4);
  std::vector<int32_t> position(count);
  std::vector<double> frequency(pairs);
  std::vector<uint64_t> turn(pairs);
  for (int32_t j = 0; j < count; ++j) position[j] = j * 7919 % 200000;
  for (int32_t i = 0; i < pairs; ++i) {
    frequency[i] = static_cast<float>(std::pow(10000.0, -static_cast<double>(i) / pairs));
    turn[i] = turn64(frequency[i]);
  }
  std::vector<float> keys(static_cast<size_t>(count) * dim + 1, -7.0f);
  loops[dtype].make_keys({latents.bytes.data(), basis.data(), options.bias ? bias.data() : nullptr,
                          options.norm ? norm.data() : nullptr, turn.data(), position.data(), options.offset, count,
                          rank, dim, pairs, 1e-5f, options.rotary_scale, keys.data()});
  REQUIRE(keys.back() == -7.0f);
  for (int32_t j = 0; j < count; ++j) {
    std::vector<double> want(dim, 0.0);
    double squares = 0.0;
    for (int32_t d = 0; d < dim; ++d) {
      for (int32_t k = 0; k < rank; ++k) want[d] += double{latents.value[j * rank + k]} * basis[k * dim + d];
      if (options.bias) want[d] += bias[d];
      squares += want[d] * want[d];
    }
    for (int32_t d = 0; d < dim; ++d) {
      if (options.norm) want[d] *= norm[d] / std::sqrt(squares / dim + 1e-5);
    }
    for (int32_t i = 0; i < pairs; ++i) {
      const double angle = static_cast<double>(position[j] + options.offset) * frequency[i], x = want[i],
                   y = want[i + pairs];
      want[i] = (x * std::cos(angle) - y * std::sin(angle)) * options.rotary_scale;
      want[i + pairs] = (y * std::cos(angle) + x * std::sin(angle)) * options.rotary_scale;
    }
    for (int32_t d = 0; d < dim; ++d) {
      if (!(std::abs(keys[static_cast<size_t>(j) * dim + d] - want[d]) < 2e-5)) {
        FAIL("token " << j << ", channel " << d << ": " << keys[static_cast<size_t>(j) * dim + d] << " for "
                      << want[d]);
      }
    }
  }
}

}  // namespace

TEST_CASE("keys equal products, norms and rotations in double precision", "[keys]") {
  for (const auto& [name, loops] : copies()) {
    for (const DType dtype : kDTypes) {
      CAPTURE(name, static_cast<int>(dtype));
      for (const int32_t count : {0, 1, 3, 4, 5, 9}) check(*loops, dtype, count, 32, 64, 32, {true, false});
      for (const int32_t dim : {8, 24, 40, 80, 128, 256}) {
        check(*loops, dtype, 7, 16, dim, dim / 2, {false, false});
        check(*loops, dtype, 7, dim, 64, 11, {true, true, 1.3f, -500});
        check(*loops, dtype, 7, 24, dim, 0, {true, true});
        check(*loops, dtype, 7, 24, dim, 3, {false, true, 0.5f, 70000});
      }
    }
  }
}

TEST_CASE("a frequency is a share of a full turn, whatever its sign and size", "[keys]") {
  REQUIRE(turn64(0.0) == 0);
  REQUIRE(turn64(kRadiansOfTurn / 4) == uint64_t{1} << 62);
  REQUIRE(turn64(-kRadiansOfTurn / 4) == uint64_t{3} << 62);
  REQUIRE(turn64(2.5 * kRadiansOfTurn) == uint64_t{1} << 63);
  REQUIRE(turn64(-1e-300) == 0);  // less than the smallest share
}
