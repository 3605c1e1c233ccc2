// SPDX-License-Identifier: Apache-2.0
// The worked selection on every device, and the defaults of the C++ entry.
#include "ops/select_tokens.h"

#include "support/precompiled.hpp"
#include "support/torch.hpp"

TEST_CASE("keeps sinks, window and the best pooled scores, ascending, ties to the lower column", "[select_tokens]") {
  for (const at::Device device : uncomp::test::devices()) {
    const at::Tensor scores =
        at::tensor({.35f, .09f, .05f, .07f, .47f, .18f, .17f, .13f, 9.f, 9.f}).view({1, 10}).to(device);
    const at::Tensor length = at::tensor({10}, at::kInt).to(device), keep = at::tensor({6}, at::kInt).to(device);
    const auto [pooled, start] = uncomp::select_tokens(scores, length, keep, 6, 0, 2, 3);
    REQUIRE(at::equal(pooled.cpu(), at::tensor({0, 3, 4, 5, 8, 9}, at::kInt)));
    REQUIRE(at::equal(start.cpu(), at::tensor({0, 6}, at::kInt)));
    const at::Tensor plain = std::get<0>(uncomp::select_tokens(scores, length, keep, 6, 0, 2));
    REQUIRE(at::equal(plain.cpu(), at::tensor({0, 4, 5, 6, 8, 9}, at::kInt)));
    const at::Tensor mean = std::get<0>(uncomp::select_tokens(scores, length, keep, 6, 0, 2, 3, "avg"));
    REQUIRE(at::equal(mean.cpu(), at::tensor({1, 3, 4, 5, 8, 9}, at::kInt)));
  }
}

TEST_CASE("an even pool is a ValueError", "[select_tokens]") {
  const at::Tensor one = at::ones({1}, at::kInt);
  REQUIRE_THROWS_WITH(uncomp::select_tokens(at::zeros({1, 4}), one, one, 1, 0, 0, 2),
                      uncomp::test::ContainsSubstring("uncomp::select_tokens: pool must be odd and at least 1; got 2"));
}
