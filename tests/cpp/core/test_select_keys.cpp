// SPDX-License-Identifier: Apache-2.0
// Keys keep the order of floats, pooling sees exactly its neighbours, and a row's numbers are clamped whatever they
// say.
#include "core/select_keys.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "support/catch.hpp"

using namespace uncomp;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int32_t kMost = std::numeric_limits<int32_t>::max(), kLeast = std::numeric_limits<int32_t>::min();

uint32_t pooled(const std::vector<float>& x, int32_t column, int32_t pool, Pool mode) {
  return pooled_key([&](int32_t c) { return x.at(c); }, column, pool / 2, static_cast<int32_t>(x.size()), mode);
}

}  // namespace

TEST_CASE("keys are ordered like the floats they come from", "[select_keys]") {
  const float ascending[] = {-kInf, -3e38f, -1.0f, -1e-40f, 0.0f, 1e-45f, 1e-40f, 1e-38f, 0.5f, 1.0f, 3e38f, kInf};
  for (size_t i = 0; i + 1 < std::size(ascending); ++i) {
    REQUIRE(select_key(ascending[i]) < select_key(ascending[i + 1]));
    REQUIRE(rank_key(ascending[i]) < rank_key(ascending[i + 1]));
  }
  std::mt19937 random(1);
  for (int i = 0; i < 100000; ++i) {
    const float a = std::bit_cast<float>(static_cast<uint32_t>(random()));
    const float b = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (std::isnan(a) || std::isnan(b)) continue;
    if ((a < b) != (select_key(a) < select_key(b)) || (a == b) != (select_key(a) == select_key(b))) {
      FAIL(a << " and " << b);
    }
  }
}

TEST_CASE("zeros are equal, NaN is lowest for selection and highest for ranking", "[select_keys]") {
  REQUIRE(select_key(-0.0f) == select_key(0.0f));
  REQUIRE(rank_key(-0.0f) == rank_key(0.0f));
  for (const uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xffffffffu}) {
    REQUIRE(select_key(std::bit_cast<float>(bits)) < select_key(-kInf));
    REQUIRE(rank_key(std::bit_cast<float>(bits)) > rank_key(kInf));
    REQUIRE(rank_key(std::bit_cast<float>(bits)) == rank_key(kNan));
  }
}

TEST_CASE("max pooling ignores what lies outside and NaN beside numbers", "[select_keys]") {
  const std::vector<float> x{1.0f, kNan, -2.0f, kNan, kNan, kNan};
  REQUIRE(pooled(x, 0, 3, Pool::max) == select_key(1.0f));
  REQUIRE(pooled(x, 2, 3, Pool::max) == select_key(-2.0f));
  REQUIRE(pooled(x, 3, 3, Pool::max) == select_key(-2.0f));
  REQUIRE(pooled(x, 4, 3, Pool::max) == 0u);
  REQUIRE(pooled(x, 5, 129, Pool::max) == select_key(1.0f));
  REQUIRE(pooled(x, 2, 1, Pool::max) == select_key(-2.0f));
}

TEST_CASE("average pooling counts columns outside as 0 and sums upwards", "[select_keys]") {
  const std::vector<float> x{1e8f, 1.0f, -1e8f, 3.0f, kNan, kInf};
  REQUIRE(pooled(x, 0, 3, Pool::avg) == select_key((1e8f + 1.0f) / 3.0f));
  REQUIRE(pooled(x, 1, 3, Pool::avg) == select_key(((1e8f + 1.0f) + -1e8f) / 3.0f));
  REQUIRE(pooled(x, 2, 3, Pool::avg) == select_key(((1.0f + -1e8f) + 3.0f) / 3.0f));
  REQUIRE(pooled(x, 3, 3, Pool::avg) == 0u);
  REQUIRE(pooled(x, 5, 1, Pool::avg) == select_key(kInf));
  REQUIRE(pooled({-0.0f}, 0, 3, Pool::avg) == select_key(0.0f));
}

TEST_CASE("a row keeps between its protected tokens and all of them", "[select_keys]") {
  const SelectRow row = select_row(10, 6, 12, 1, 2);
  REQUIRE(row.tokens == 10);
  REQUIRE(row.keep == 6);
  REQUIRE(row.head == 1);
  REQUIRE(row.tail == 2);
  REQUIRE(row.need == 3);
  REQUIRE(select_row(10, kLeast, 12, 1, 2).keep == 3);
  REQUIRE(select_row(10, kLeast, 12, 1, 2).need == 0);
  REQUIRE(select_row(10, kMost, 12, 1, 2).keep == 10);
  REQUIRE(select_row(kMost, 5, 12, 0, 0).tokens == 12);
  REQUIRE(select_row(kLeast, 5, 12, 3, 3).keep == 0);
  const SelectRow wide = select_row(10, 0, 12, kMost, kMost);
  REQUIRE(wide.keep == 10);
  REQUIRE(wide.head == 10);
  REQUIRE(wide.tail == 0);
  REQUIRE(wide.need == 0);
}
