// SPDX-License-Identifier: Apache-2.0
// The block finds the plan of the serial rule, from one row to the largest table, and notes what it had to clamp.
#include "kernels/allocate_budget.h"

#include <random>

#include "core/budget.h"
#include "core/errors.h"
#include "kernels/runtime.h"
#include "support/catch.hpp"
#include "support/device.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

int32_t noted() {
  int32_t code = 0;
  cuda_ok(kernels::take_error(&code));
  return code;
}

/// `count` sequences with tables of their own and with a shared one.
void check(int32_t rows, int32_t groups, int32_t count) {
  std::mt19937 random(static_cast<uint32_t>(rows * 7 + groups));
  const auto draw = [&](int64_t low, int64_t high) {
    return static_cast<int32_t>(std::uniform_int_distribution<int64_t>(low, high)(random));
  };
  for (const bool shared_table : {true, false}) {
    const size_t tables = shared_table ? 1 : count;
    std::vector<int32_t> group(static_cast<size_t>(count) * rows), weight(tables * groups), length(count), total(count);
    for (int32_t& g : group) g = draw(0, groups - 1);
    for (int32_t& w : weight) w = draw(1, rows % 2 == 0 ? 50 : kMaxBudgetWeight);
    for (int32_t n = 0; n < count; ++n) {
      length[n] = draw(0, 2000);
      total[n] = n == 0 ? 2147483647 : draw(int64_t{rows} * 8, int64_t{rows} * 1500 + 7);
    }
    DeviceArray<int32_t> d_group(group), d_weight(weight), d_length(length), d_total(total), limit(group.size());
    cuda_ok(kernels::allocate_budget({d_group.data(), d_weight.data(), d_length.data(), d_total.data(), limit.data(),
                                      shared_table ? 0 : groups, count, rows, groups, 8},
                                     nullptr));
    const std::vector<int32_t> got = limit.host();
    std::vector<int32_t> want(group.size());
    for (int32_t n = 0; n < count; ++n) {
      REQUIRE(allocate_rows(&group[static_cast<size_t>(n) * rows], rows, &weight[shared_table ? 0 : n * groups], groups,
                            length[n], total[n], 8, &want[static_cast<size_t>(n) * rows]));
    }
    if (got != want) FAIL("rows " << rows << " groups " << groups);
    REQUIRE(limit.guards_intact());
    REQUIRE(noted() == 0);
  }
}

}  // namespace

TEST_CASE("limits equal the serial rule and nothing else is written", "[allocate_budget]") {
  for (const int32_t rows : {1, 32, 33, 1025}) {
    for (const int32_t groups : {1, 8, 1500}) check(rows, groups, 2);
  }
  check(1300, kMaxBudgetRows, 2);  // the largest shared memory
}

TEST_CASE("limits equal the serial rule up to the largest tables", "[allocate_budget][large]") {
  for (const int32_t rows : {1, 8, 32, 33, 1000, 1024, 1025, 5000, kMaxBudgetRows}) {
    for (const int32_t groups : {1, 2, 8, 40, 1500, kMaxBudgetRows}) check(rows, groups, 4);
  }
}

TEST_CASE("ids, weights and totals outside their range are clamped and noted", "[allocate_budget]") {
  const auto run = [](std::vector<int32_t> group, std::vector<int32_t> weight, int32_t length, int32_t total) {
    DeviceArray<int32_t> d_group(group), d_weight(weight), d_length(std::vector<int32_t>{length}),
        d_total(std::vector<int32_t>{total}), limit(2);
    cuda_ok(kernels::allocate_budget(
        {d_group.data(), d_weight.data(), d_length.data(), d_total.data(), limit.data(), 0, 1, 2, 2, 4}, nullptr));
    return limit.host();
  };
  const int32_t input = static_cast<int32_t>(DeviceError::allocate_budget_input);
  const int32_t short_total = static_cast<int32_t>(DeviceError::allocate_budget_total);
  REQUIRE(run({-9, 7}, {1, 3}, 99, 40) == std::vector<int32_t>{10, 30});
  REQUIRE(noted() == input);
  REQUIRE(run({0, 1}, {-4, 3}, 99, 40) == std::vector<int32_t>{10, 30});
  REQUIRE(noted() == input);
  REQUIRE(run({0, 1}, {1, 3}, -1, 40) == std::vector<int32_t>{10, 30});
  REQUIRE(noted() == input);
  REQUIRE(run({0, 1}, {1, 3}, 99, 7) == std::vector<int32_t>{4, 4});
  REQUIRE(noted() == short_total);
  REQUIRE(run({0, 1}, {1, 3}, 99, -2147483647) == std::vector<int32_t>{4, 4});
  REQUIRE(noted() == short_total);
}
