// SPDX-License-Identifier: Apache-2.0
// Logits of many queries, softmax, votes and pools: every copy of the loops against plain ones.
#include <algorithm>

#include "core/eviction.h"
#include "core/votes.h"
#include "cpu/pieces.h"
#include "support/catch.hpp"
#include "support/loops.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

}  // namespace

TEST_CASE("logits equal the products in double precision, whatever the stride of the keys", "[rows]") {
  for (const auto& [name, loops] : copies()) {
    for (const DType dtype : kDTypes) {
      CAPTURE(name, static_cast<int>(dtype));
      for (const auto& [queries, count, dim] :
           {std::tuple{1, 1, 8}, {2, 31, 16}, {3, 32, 24}, {5, 33, 64}, {6, 64, 128}, {13, 70, 40}, {32, 100, 72}}) {
        const int32_t stride = dim + 8, room = (count + cpu::kKeyTile - 1) / cpu::kKeyTile * cpu::kKeyTile;
        const std::vector<float> query = random_floats(queries * dim, -1.0f, 1.0f, 3);
        const Numbers keys(static_cast<size_t>(count) * stride, dtype, 4);
        std::vector<float> out(static_cast<size_t>(queries) * room), scratch(cpu::kKeyTile * dim);
        (*loops)[dtype].logits(
            {query.data(), keys.bytes.data(), stride, queries, count, dim, 0.7f, out.data(), room, scratch.data()});
        for (int32_t q = 0; q < queries; ++q) {
          for (int32_t j = 0; j < count; ++j) {
            double want = 0.0;
            for (int32_t d = 0; d < dim; ++d) want += double{query[q * dim + d]} * keys.value[j * stride + d];
            REQUIRE(out[q * room + j] == Approx(0.7 * want).epsilon(1e-4).margin(1e-4));
          }
        }
        std::vector<float> norm(count);
        (*loops)[dtype].norms(keys.bytes.data(), stride, count, dim, norm.data());
        for (int32_t j = 0; j < count; ++j) {
          double want = 0.0;
          for (int32_t d = 0; d < dim; ++d) want += keys.value[j * stride + d] * keys.value[j * stride + d];
          REQUIRE(norm[j] == Approx(std::sqrt(want)).epsilon(1e-5));
        }
      }
    }
  }
}

TEST_CASE("exp is exact to two units in the last place and ends in 0 and inf", "[rows]") {
  std::vector<float> x = random_floats(20000, -87.0f, 88.0f, 5);
  for (const float odd : {0.0f, -0.0f, 1e-8f, -1e-8f, 88.2f, -87.2f}) x.push_back(odd);
  for (const auto& [name, loops] : copies()) {
    CAPTURE(name);
    std::vector<float> y(x.size());
    loops->exp_minus(x.data(), 0.0f, static_cast<int32_t>(x.size()), y.data());
    double worst = 0.0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = std::exp(double{x[i]});
      worst = std::max(worst, std::abs(y[i] - want) / want);
    }
    REQUIRE(worst < 2.4e-7);
    std::vector<float> odd{-kInf, -1e30f, -200.0f, -88.0f, 89.0f, 1e30f, kInf, std::nanf("")};
    loops->exp_minus(odd.data(), 0.0f, 8, odd.data());
    for (int i = 0; i < 4; ++i) REQUIRE(odd[i] == 0.0f);
    for (int i = 4; i < 7; ++i) REQUIRE(odd[i] == kInf);
    REQUIRE(std::isnan(odd[7]));
  }
}

TEST_CASE("a softmax row sees its first tokens and gives the others 0", "[rows]") {
  for (const auto& [name, loops] : copies()) {
    for (const int32_t count : {1, 17, 32, 50}) {
      for (int32_t visible = 0; visible <= count; visible += 1 + count / 7) {
        CAPTURE(name, count, visible);
        std::vector<float> logits = random_floats(64, -3.0f, 3.0f, 6), before = logits;
        logits.push_back(5.0f);
        float largest = 0.0f, total = 0.0f;
        for (int32_t j = visible; j < 64; ++j) logits[j] = std::nanf("");
        loops->softmax({logits.data(), visible, count, &largest, &total});
        double sum = 0.0;
        const float most = visible == 0 ? -kInf : *std::max_element(before.begin(), before.begin() + visible);
        REQUIRE(largest == most);
        for (int32_t j = 0; j < visible; ++j) {
          REQUIRE(logits[j] == Approx(std::exp(before[j] - most)).epsilon(1e-5));
          sum += logits[j];
        }
        REQUIRE(total == Approx(sum).epsilon(1e-5));
        for (int32_t j = visible; j < (count + 31) / 32 * 32; ++j) REQUIRE(logits[j] == 0.0f);
        REQUIRE(logits[64] == 5.0f);
      }
    }
  }
}

TEST_CASE("weighted sums go down the columns", "[rows]") {
  const std::vector<float> rows = random_floats(5 * 80, -1.0f, 1.0f, 8), factor = random_floats(5, 0.0f, 1.0f, 9);
  for (const auto& [name, loops] : copies()) {
    for (const int32_t count : {1, 16, 63, 64, 79}) {
      CAPTURE(name, count);
      std::vector<float> out(80, -7.0f);
      loops->weighted_sum(rows.data(), 80, factor.data(), 5, count, out.data());
      for (int32_t j = 0; j < count; ++j) {
        double want = 0.0;
        for (int32_t i = 0; i < 5; ++i) want += double{rows[i * 80 + j]} * factor[i];
        REQUIRE(out[j] == Approx(want).epsilon(1e-5).margin(1e-6));
      }
      REQUIRE(out[count] == -7.0f);
    }
  }
}

TEST_CASE("a vote of one head is core's vote to the bit; NaN in any head votes 0", "[rows]") {
  for (const auto& [name, loops] : copies()) {
    for (const int32_t bits : {24, 27, 30}) {
      CAPTURE(name, bits);
      std::vector<float> weight = random_floats(500, 0.0f, 1e-5f, 10), more = random_floats(501, -0.1f, 1.1f, 11);
      weight.insert(weight.end(), more.begin(), more.end());
      for (const float odd :
           {0.0f, 1.0f, kInf, -kInf, std::nanf(""), std::ldexp(0.5f, -bits), std::ldexp(1.5f, -bits)}) {
        weight.push_back(odd);
      }
      const int32_t count = static_cast<int32_t>(weight.size());
      std::vector<int32_t> vote(count + 1, -7);
      const float one = 1.0f;
      for (const bool largest : {false, true}) {
        loops->votes({weight.data(), count, &one, 1, count, bits, largest, vote.data()});
        for (int32_t j = 0; j < count; ++j) REQUIRE(vote[j] == quantize_vote(weight[j], bits));
        REQUIRE(vote[count] == -7);
      }
    }
    const float nan = std::nanf("");
    const std::vector<float> weight{0.1f, 0.2f, nan, 0.5f, 0.4f, 0.3f, 0.6f, nan, 0.1f, 0.1f, nan, 0.2f};  // [3, 4]
    const float factor[3] = {1.0f, 0.5f, 2.0f};
    int32_t vote[4];
    loops->votes({weight.data(), 4, factor, 3, 4, 20, true, vote});
    REQUIRE(vote[0] == quantize_vote(0.2f, 20));
    REQUIRE(vote[1] == quantize_vote(0.2f, 20));
    REQUIRE(vote[2] == 0);
    REQUIRE(vote[3] == 0);
    loops->votes({weight.data(), 4, factor, 3, 4, 20, false, vote});
    REQUIRE(vote[0] == Approx((0.1 + 0.2 + 0.2) / 3 * (1 << 20)).margin(1));
    REQUIRE(vote[2] == 0);
    REQUIRE(vote[3] == 0);
  }
}

TEST_CASE("a turn of the ring keeps the sum, modulo 2^32", "[rows]") {
  for (const auto& [name, loops] : copies()) {
    CAPTURE(name);
    const std::vector<int32_t> vote{5, 0, INT32_MAX, 7, INT32_MIN};
    std::vector<int32_t> ring{1, 2, INT32_MIN, 7, 1}, sum{10, 2, 0, INT32_MIN, INT32_MAX};
    loops->turn_ring(vote.data(), 5, ring.data(), sum.data());
    REQUIRE(ring == vote);
    REQUIRE(sum == std::vector<int32_t>{14, 0, -1, INT32_MIN, -2});
  }
}

TEST_CASE("the smallest pooled score is found as the rule says", "[rows]") {
  std::mt19937 random(12);
  for (int round = 0; round < 400; ++round) {
    const int32_t count = 1 + static_cast<int32_t>(random() % 90), first = static_cast<int32_t>(random() % count);
    const int32_t pool = 1 + 2 * static_cast<int32_t>(random() % 65), half = pool / 2;
    const Pool mode = round % 2 ? Pool::max : Pool::avg;
    const int32_t most = round % 3 ? 4 : 1 << 30;  // few values make ties
    std::vector<int32_t> sum(count), scratch(count);
    for (int32_t& x : sum) x = static_cast<int32_t>(random() % most);
    Leaver best = kNobody;
    for (int32_t i = first; i < count; ++i) {
      int64_t score = mode == Pool::max ? INT32_MIN : 0;
      for (int32_t k = std::max(i - half, 0); k <= std::min(i + half, count - 1); ++k) {
        score = mode == Pool::max ? std::max<int64_t>(score, sum[k]) : score + sum[k];
      }
      if (leaves_before({score, i}, best)) best = {score, i};
    }
    for (const auto& [name, loops] : copies()) {
      CAPTURE(name, count, first, pool);
      REQUIRE(loops->smallest_pooled(sum.data(), count, first, pool, mode, scratch.data()) == best.place);
    }
  }
}

TEST_CASE("the pieces of a row cover it once", "[rows]") {
  for (const int32_t group : {1, 4, 5, 16}) {
    for (const int32_t len : {0, 1, 63, 255, 256, 257, 1552, 4096, 32768, 100001, INT32_MAX - 5000}) {
      const int32_t tokens = cpu::piece_tokens(len, group), count = cpu::num_pieces(len, tokens);
      REQUIRE(tokens >= 256);
      REQUIRE(tokens <= 1024);
      REQUIRE(count >= 1);
      REQUIRE(int64_t{tokens} * count >= len);
      REQUIRE((len == 0 || int64_t{tokens} * (count - 1) < len));
    }
  }
}
