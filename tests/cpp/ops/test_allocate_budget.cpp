// SPDX-License-Identifier: Apache-2.0
// Limits that sum to the total on every device; a total below the floors is refused on the CPU.
#include "ops/allocate_budget.h"

#include "support/precompiled.hpp"
#include "support/torch.hpp"

namespace {

at::Tensor ints(std::initializer_list<int> values) { return at::tensor(at::ArrayRef<int>(values), at::kInt); }

}  // namespace

TEST_CASE("limits of two sequences with one table of weights", "[allocate_budget]") {
  for (const at::Device device : uncomp::test::devices()) {
    const at::Tensor group = ints({0, 1, 1, 1, 0, 1}).view({2, 3}).to(device);
    const at::Tensor limit = uncomp::allocate_budget(group, ints({2, 4}).to(device), ints({4096, 90}).to(device),
                                                     ints({300, 300}).to(device), 8);
    REQUIRE(at::equal(limit.cpu(), ints({60, 120, 120, 105, 90, 105}).view({2, 3})));
  }
}

TEST_CASE("a total below rows * floor is a ValueError that names both numbers", "[allocate_budget]") {
  REQUIRE_THROWS_WITH(
      uncomp::allocate_budget(ints({0, 0}).view({1, 2}), ints({1}), ints({9}), ints({15}), 8),
      uncomp::test::ContainsSubstring("uncomp::allocate_budget: total must be at least rows * floor = 16; got 15"));
}
