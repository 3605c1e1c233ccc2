// SPDX-License-Identifier: Apache-2.0
// Hidden states, cos, sin and positions must follow one index together, bit for bit, on every device.
#include "ops/gather_tokens.h"

#include "support/precompiled.hpp"
#include "support/torch.hpp"

TEST_CASE("gathers several dtypes by one index; -1 gives zeros; a batch of 1 is shared", "[gather_tokens]") {
  for (const at::Device device : uncomp::test::devices()) {
    const at::Tensor hidden = at::randn({2, 5, 24}, at::device(device).dtype(at::kHalf));
    const at::Tensor angle = at::randn({1, 5, 6}, at::device(device));
    const at::Tensor position = at::arange(10, at::device(device).dtype(at::kLong)).view({2, 5});
    const at::Tensor index = at::tensor({-1, 0, 4, 3, 3, 1}, at::kInt).view({2, 3}).to(device);
    const auto out = uncomp::gather_tokens({hidden, angle, position}, index);
    REQUIRE(out.size() == 3);
    REQUIRE(at::equal(out[0][0][0], at::zeros_like(out[0][0][0])));
    REQUIRE(at::equal(out[0][0][2], hidden[0][4]));
    REQUIRE(at::equal(out[0][1][1], hidden[1][3]));
    REQUIRE(at::equal(out[1][1][2], angle[0][1]));
    REQUIRE(out[2].cpu()[1][0].item<int64_t>() == 8);
  }
}

TEST_CASE("an index that is not int32 is a TypeError that names it", "[gather_tokens]") {
  const at::Tensor x = at::randn({1, 3, 4});
  REQUIRE_THROWS_WITH(uncomp::gather_tokens({x}, at::zeros({1, 2}, at::kLong)),
                      uncomp::test::ContainsSubstring("uncomp::gather_tokens: index must be int32; got int64"));
}
