// SPDX-License-Identifier: Apache-2.0
// Eviction compares sums of votes for any number of steps: they must neither overflow nor drift.
#include "core/votes.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "core/constants.h"
#include "support/catch.hpp"

using namespace uncomp;

TEST_CASE("a full ring of votes of 1.0 stays below 2^31 and no bit is given away", "[votes]") {
  for (int32_t window = 1; window <= kMaxVoteWindow; ++window) {
    const int32_t bits = vote_scale_bits(window);
    REQUIRE((int64_t{window} << bits) <= int64_t{1} << 30);
    REQUIRE((int64_t{window} << (bits + 1)) > int64_t{1} << 30);
  }
  REQUIRE(vote_scale_bits(1) == 30);
  REQUIRE(vote_scale_bits(8) == 27);
  REQUIRE(vote_scale_bits(9) == 26);
  REQUIRE(vote_scale_bits(64) == 24);
}

TEST_CASE("a vote is the nearest integer, clamped; NaN counts nothing", "[votes]") {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const int32_t bits : {24, 27, 30}) {
    const int32_t one = 1 << bits;
    REQUIRE(quantize_vote(nan, bits) == 0);
    REQUIRE(quantize_vote(-inf, bits) == 0);
    REQUIRE(quantize_vote(-0.25f, bits) == 0);
    REQUIRE(quantize_vote(0.0f, bits) == 0);
    REQUIRE(quantize_vote(1e-38f, bits) == 0);
    REQUIRE(quantize_vote(0.5f, bits) == one / 2);
    REQUIRE(quantize_vote(1.0f, bits) == one);
    REQUIRE(quantize_vote(1.5f, bits) == one);
    REQUIRE(quantize_vote(inf, bits) == one);
    REQUIRE(quantize_vote(0.5f / static_cast<float>(one), bits) == 1);
    REQUIRE(quantize_vote(0.49f / static_cast<float>(one), bits) == 0);
  }
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  for (int i = 0; i < 2000; ++i) {
    const float weight = uniform(random);
    REQUIRE(quantize_vote(weight, 24) == std::llround(static_cast<double>(weight) * (1 << 24)));
    REQUIRE(std::abs(vote_weight(quantize_vote(weight, 24), 24) - weight) <= std::ldexp(1.0f, -25));
  }
}

TEST_CASE("the running sum equals the sum of the ring after 100000 replaced votes", "[votes]") {
  std::mt19937 random(2);
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  constexpr int32_t window = 8, bits = vote_scale_bits(window);
  std::vector<int32_t> ring(window, 0);
  int32_t sum = 0;
  for (int step = 0; step < 100000; ++step) {
    const int32_t vote = quantize_vote(uniform(random), bits);
    sum += vote - ring[step % window];
    ring[step % window] = vote;
  }
  int32_t want = 0;
  for (const int32_t vote : ring) want += vote;
  REQUIRE(sum == want);
}
