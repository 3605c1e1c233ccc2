// SPDX-License-Identifier: Apache-2.0
// Ranks and groups on every device; a number of groups that cannot be is refused.
#include "ops/group_heads.h"

#include "support/precompiled.hpp"
#include "support/torch.hpp"

TEST_CASE("ranks rows with ties to the lower row and NaN last, and cuts them into groups", "[group_heads]") {
  for (const at::Device device : uncomp::test::devices()) {
    const at::Tensor entropy = at::tensor({0.5f, std::nanf(""), 0.25f, 0.5f, 0.0f}).view({1, 5}).to(device);
    const auto [group, rank] = uncomp::group_heads(entropy, 2);
    REQUIRE(at::equal(rank.cpu(), at::tensor({2, 4, 1, 3, 0}, at::kInt).view({1, 5})));
    REQUIRE(at::equal(group.cpu(), at::tensor({1, 1, 0, 1, 0}, at::kInt).view({1, 5})));
    REQUIRE(at::equal(std::get<0>(uncomp::group_heads(entropy, 2, "reverse")).cpu(), 1 - group.cpu()));
  }
}

TEST_CASE("more groups than rows is a ValueError that names both", "[group_heads]") {
  REQUIRE_THROWS_WITH(uncomp::group_heads(at::zeros({1, 3}), 4),
                      uncomp::test::ContainsSubstring("uncomp::group_heads: num_groups must lie in 1 .. H = 3; got 4"));
}
