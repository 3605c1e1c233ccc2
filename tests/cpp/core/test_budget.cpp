// SPDX-License-Identifier: Apache-2.0
// Group sizes and the exact split of a budget: the sum always, the bounds always, and no product past 64 bits.
#include "core/budget.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "support/catch.hpp"

using namespace uncomp;

namespace {

std::vector<int32_t> sizes(int32_t rows, int32_t groups) {
  const GroupSizes cut(rows, groups);
  std::vector<int32_t> all(groups);
  for (int32_t g = 0; g < groups; ++g) all[g] = cut.size(g);
  return all;
}

std::vector<int32_t> limits(const std::vector<int32_t>& group, const std::vector<int32_t>& weight, int32_t length,
                            int32_t total, int32_t floor) {
  std::vector<int32_t> limit(group.size());
  REQUIRE(allocate_rows(group.data(), static_cast<int32_t>(group.size()), weight.data(),
                        static_cast<int32_t>(weight.size()), length, total, floor, limit.data()));
  return limit;
}

int64_t sum(const std::vector<int32_t>& all) { return std::accumulate(all.begin(), all.end(), int64_t{0}); }

}  // namespace

TEST_CASE("leftover rows go to the outer groups: last, first, last but one, second", "[budget]") {
  REQUIRE(sizes(32, 2) == std::vector<int32_t>{16, 16});
  REQUIRE(sizes(32, 3) == std::vector<int32_t>{11, 10, 11});
  REQUIRE(sizes(32, 5) == std::vector<int32_t>{7, 6, 6, 6, 7});
  REQUIRE(sizes(3, 2) == std::vector<int32_t>{1, 2});
  REQUIRE(sizes(8, 5) == std::vector<int32_t>{2, 1, 1, 2, 2});
  REQUIRE(sizes(9, 5) == std::vector<int32_t>{2, 2, 1, 2, 2});
}

TEST_CASE("every rank falls into the group whose size covers it", "[budget]") {
  for (int32_t rows = 1; rows <= 70; ++rows) {
    for (int32_t groups = 1; groups <= rows; ++groups) {
      const GroupSizes cut(rows, groups);
      int32_t rank = 0;
      for (int32_t g = 0; g < groups; ++g) {
        for (int32_t i = 0; i < cut.size(g); ++i, ++rank) {
          if (cut.group_of(rank) != g) FAIL("rows " << rows << " groups " << groups << " rank " << rank);
        }
      }
      if (rank != rows) FAIL("rows " << rows << " groups " << groups << " sum to " << rank);
    }
  }
}

TEST_CASE("bounds: a prompt that does not fit is cut, one that fits is stored whole", "[budget]") {
  const BudgetBounds scarce = budget_bounds(8, 4096, 3072, 8);
  REQUIRE(scarce.low == 8);
  REQUIRE(scarce.high == 4096);
  REQUIRE(scarce.feasible);
  const BudgetBounds ample = budget_bounds(8, 200, 3072, 8);
  REQUIRE(ample.low == 200);
  REQUIRE(ample.high == 2147483647);
  REQUIRE_FALSE(budget_bounds(8, 4096, 63, 8).feasible);
  REQUIRE_FALSE(budget_bounds(1, 0, -1, 0).feasible);
}

TEST_CASE("worked plans come out token for token", "[budget]") {
  const std::vector<int32_t> one_each{0, 1, 2, 3, 4, 5, 6, 7}, linear{7, 11, 15, 19, 23, 27, 31, 35};
  REQUIRE(limits({0, 0, 0, 0, 1, 1, 1, 1}, {2, 4}, 500, 3072, 8) ==
          std::vector<int32_t>{268, 268, 268, 268, 500, 500, 500, 500});
  REQUIRE(limits(one_each, linear, 4096, 3072, 8) == std::vector<int32_t>{128, 201, 274, 347, 421, 494, 567, 640});
  REQUIRE(limits(one_each, linear, 300, 3072, 8) == std::vector<int32_t>{300, 300, 300, 306, 370, 434, 499, 563});
  REQUIRE(limits(one_each, linear, 4096, 80, 8) == std::vector<int32_t>{8, 8, 8, 8, 10, 11, 13, 14});
  REQUIRE(limits({0, 1, 1}, {2, 4}, 4096, 300, 8) == std::vector<int32_t>{60, 120, 120});
}

TEST_CASE("a total below the floors gives every row the floor and says so", "[budget]") {
  const std::vector<int32_t> group{0, 1}, weight{1, 2};
  std::vector<int32_t> limit(2);
  REQUIRE_FALSE(allocate_rows(group.data(), 2, weight.data(), 2, 100, 15, 8, limit.data()));
  REQUIRE(limit == std::vector<int32_t>{8, 8});
}

TEST_CASE("random plans sum to the total, keep their bounds and follow the weights", "[budget]") {
  std::mt19937 random(7);
  const auto draw = [&](int64_t low, int64_t high) {
    return static_cast<int32_t>(std::uniform_int_distribution<int64_t>(low, high)(random));
  };
  for (int round = 0; round < 3000; ++round) {
    const int32_t rows = draw(1, 40), groups = draw(1, 12), floor = draw(0, 30), length = draw(0, 900);
    std::vector<int32_t> group(rows), weight(groups);
    for (int32_t& g : group) g = draw(0, groups - 1);
    for (int32_t& w : weight) w = draw(1, round % 2 == 0 ? 40 : kMaxBudgetWeight);
    const int32_t total = draw(int64_t{rows} * floor, int64_t{rows} * 1000 + 20);
    const std::vector<int32_t> limit = limits(group, weight, length, total, floor);
    const BudgetBounds bounds = budget_bounds(rows, length, total, floor);
    bool good = sum(limit) == total;
    for (int32_t h = 0; h < rows; ++h) {
      good = good && limit[h] >= bounds.low && limit[h] <= bounds.high;
      for (int32_t other = 0; other < rows; ++other) {
        const int32_t w = weight[group[h]], v = weight[group[other]];
        good = good && (w < v || limit[h] >= limit[other] - (w == v && h > other ? 1 : 0));
      }
    }
    if (!good) FAIL("round " << round);
  }
}

TEST_CASE("the largest rows, weights and totals stay inside 64 bits", "[budget]") {
  const int32_t most = 2147483647;
  std::vector<int32_t> group(kMaxBudgetRows);
  for (int32_t h = 0; h < kMaxBudgetRows; ++h) group[h] = h % 3;
  for (const int32_t length : {0, 131071, 200000, most}) {
    const std::vector<int32_t> limit = limits(group, {1, kMaxBudgetWeight - 1, kMaxBudgetWeight}, length, most, 8);
    REQUIRE(sum(limit) == most);
    REQUIRE(*std::min_element(limit.begin(), limit.end()) >= 8);
  }
  const int64_t heavy = int64_t{kMaxBudgetRows} * kMaxBudgetWeight;
  const BudgetShare share = budget_share(most, kMaxBudgetWeight, heavy);
  REQUIRE(share.whole == most / kMaxBudgetRows);
  REQUIRE(share.whole * heavy / kMaxBudgetWeight + share.rest / kMaxBudgetWeight == most);
}
