// SPDX-License-Identifier: Apache-2.0
// Attention over a run of tokens: every copy of the loops against sums in double precision.
#include <algorithm>

#include "support/catch.hpp"
#include "support/loops.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Run {
  std::vector<float> weight, largest, total, sum;

  Run(const cpu::Loops& loops, DType dtype, const std::vector<float>& query, const void* keys, const void* values,
      int32_t count, int32_t group, int32_t key_dim, int32_t value_dim, float scale)
      : weight(static_cast<size_t>(group) * (count + 3), -7.0f),
        largest(group, -7.0f),
        total(group, -7.0f),
        sum(static_cast<size_t>(group) * value_dim, -7.0f) {
    loops[dtype].attend({query.data(), keys, values, count, group, key_dim, value_dim, scale, weight.data(), count + 3,
                         largest.data(), total.data(), sum.data()});
  }
};

void check(const cpu::Loops& loops, DType dtype, int32_t count, int32_t group, int32_t key_dim, int32_t value_dim) {
  const float scale = 0.3f;
  const std::vector<float> query = random_floats(static_cast<size_t>(group) * key_dim, -1.0f, 1.0f, 7);
  const Numbers keys(static_cast<size_t>(count) * key_dim, dtype, 1),
      values(static_cast<size_t>(count) * value_dim, dtype, 2);
  const Run got(loops, dtype, query, keys.bytes.data(), values.bytes.data(), count, group, key_dim, value_dim, scale);
  for (int32_t h = 0; h < group; ++h) {
    std::vector<double> logit(count), sum(value_dim, 0.0);
    double largest = -kInf, total = 0.0;
    for (int32_t j = 0; j < count; ++j) {
      for (int32_t d = 0; d < key_dim; ++d) logit[j] += double{query[h * key_dim + d]} * keys.value[j * key_dim + d];
      logit[j] *= scale;
      largest = std::max(largest, logit[j]);
    }
    for (int32_t j = 0; j < count; ++j) {
      const double w = std::exp(logit[j] - largest);
      total += w;
      REQUIRE(got.weight[h * (count + 3) + j] == Approx(w).epsilon(1e-4).margin(1e-7));
      for (int32_t d = 0; d < value_dim; ++d) sum[d] += w * values.value[j * value_dim + d];
    }
    REQUIRE(got.weight[h * (count + 3) + count] == -7.0f);  // nothing behind the run is written
    REQUIRE(got.largest[h] == Approx(largest).margin(1e-4));
    REQUIRE(got.total[h] == Approx(total).epsilon(1e-4));
    for (int32_t d = 0; d < value_dim; ++d) {
      REQUIRE(got.sum[h * value_dim + d] == Approx(sum[d]).epsilon(1e-4).margin(2e-4 * total));
    }
  }
}

}  // namespace

TEST_CASE("attention equals the sums in double precision", "[attend]") {
  for (const auto& [name, loops] : copies()) {
    for (const DType dtype : kDTypes) {
      CAPTURE(name, static_cast<int>(dtype));
      for (const int32_t count : {1, 2, 3, 7, 8, 9, 31, 32, 33, 65, 100}) check(*loops, dtype, count, 4, 64, 64);
      for (int32_t group = 1; group <= 16; ++group) check(*loops, dtype, 21, group, 32, 48);
      for (const int32_t dim : {8, 16, 24, 40, 72, 80, 96, 128, 136, 256}) {
        check(*loops, dtype, 35, 3, dim, 64);
        check(*loops, dtype, 35, 1, 64, dim);
        check(*loops, dtype, 35, 2, dim, dim);
      }
    }
  }
}

TEST_CASE("all 16-bit numbers are widened exactly", "[attend]") {
  for (const auto& [name, loops] : copies()) {
    for (const DType dtype : {DType::float16, DType::bfloat16}) {
      CAPTURE(name, static_cast<int>(dtype));
      for (const int32_t dim : {8, 128}) {
        const std::vector<float> query(dim, 0.0f);
        const std::vector<uint16_t> key(dim, 0);
        for (int32_t first = 0; first < (1 << 16); first += dim) {
          std::vector<uint16_t> value(dim);
          for (int32_t d = 0; d < dim; ++d) value[d] = static_cast<uint16_t>(first + d);
          const Run got(*loops, dtype, query, key.data(), value.data(), 1, 1, dim, dim, 1.0f);
          int32_t wrong = 0;
          for (int32_t d = 0; d < dim; ++d) {
            const double want = decoded16(value[d], dtype);
            wrong += std::isnan(want) ? !std::isnan(got.sum[d]) : got.sum[d] != want;
          }
          REQUIRE(wrong == 0);
        }
      }
    }
  }
}

TEST_CASE("an empty run has no largest logit and sums of 0", "[attend]") {
  for (const auto& [name, loops] : copies()) {
    CAPTURE(name);
    const Run got(*loops, DType::float32, std::vector<float>(5 * 8), nullptr, nullptr, 0, 5, 8, 16, 1.0f);
    REQUIRE(std::all_of(got.largest.begin(), got.largest.end(), [](float x) { return x == -kInf; }));
    REQUIRE(std::all_of(got.total.begin(), got.total.end(), [](float x) { return x == 0.0f; }));
    REQUIRE(std::all_of(got.sum.begin(), got.sum.end(), [](float x) { return x == 0.0f; }));
  }
}

TEST_CASE("NaN and infinite logits end in the total of their head", "[attend]") {
  const float nan = std::nanf("");
  for (const auto& [name, loops] : copies()) {
    CAPTURE(name);
    // Head h sees channel h alone, so that each head has an odd logit of its own at token 20.
    std::vector<float> query(4 * 8, 0.0f), keys(33 * 8, 0.0f);
    const std::vector<float> values(33 * 8, 1.0f);
    const float odd[4] = {1.0f, nan, kInf, -kInf};
    for (int32_t h = 0; h < 4; ++h) query[h * 8 + h] = 1.0f;
    for (int32_t h = 0; h < 4; ++h) {
      keys.assign(keys.size(), 0.0f);
      keys[20 * 8 + h] = odd[h];
      const Run got(*loops, DType::float32, query, keys.data(), values.data(), 33, 4, 8, 8, 1.0f);
      const bool broken = h == 1 || h == 2;
      REQUIRE(std::isnan(got.total[h]) == broken);
      REQUIRE(std::isnan(got.sum[h * 8 + 5]) == broken);
      if (h == 3) REQUIRE(got.total[h] == Approx(32.0));
      if (h == 3) REQUIRE(got.weight[h * 36 + 20] == 0.0f);
    }
    keys.assign(keys.size(), -kInf);
    query.assign(query.size(), 1.0f);
    const Run nothing(*loops, DType::float32, query, keys.data(), values.data(), 33, 4, 8, 8, 1.0f);
    REQUIRE(nothing.largest[0] == -kInf);
    REQUIRE(nothing.total[0] == 0.0f);
    REQUIRE(nothing.sum[0] == 0.0f);
  }
}
