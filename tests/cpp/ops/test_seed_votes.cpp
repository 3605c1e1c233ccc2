// SPDX-License-Identifier: Apache-2.0
// The C++ door: votes of the worked vector as exact integers, on every device.
#include "ops/seed_votes.h"

#include <cmath>

#include "core/votes.h"
#include "support/precompiled.hpp"
#include "support/torch.hpp"

TEST_CASE("votes are the weights on the kept slots, 0 behind the query, and their sum is exact", "[seed_votes]") {
  const std::vector<double> weight{.20, .03, .25, .10, .24, .90, 1., 1., .15, .04, .22, .08, .10, .15, 1., 1.};
  for (const at::Device device : uncomp::test::devices()) {
    const auto ints = at::device(device).dtype(at::kInt);
    const at::Tensor query = at::tensor(weight).to(at::kFloat).log().view({1, 1, 2, 8}).to(device);
    const at::Tensor lse = at::zeros({1, 1, 2}, at::device(device)), keys = at::eye(8, at::device(device));
    const at::Tensor at_token = at::tensor({8, 9}, at::kInt).view({1, 2}).to(device);
    const at::Tensor position = at::tensor({0, 3, 4, 5, 8, 9, 77, 77}, at::kInt).to(device);
    const at::Tensor start = at::tensor({0, 8}, at::kInt).to(device), len = at::tensor({6}, at::kInt).to(device);
    const at::Tensor votes = at::full({2, 8}, -1, ints), sum = at::full({8}, -1, ints), step = at::full({1}, -1, ints);
    const at::Tensor order = at::full({8}, -1, ints);
    uncomp::seed_votes_(query, lse, at_token, keys, position, start, len, votes, sum, step, order, 1.0, "mean");
    const at::Tensor got = votes.cpu(), total = sum.cpu();
    for (int64_t slot = 0; slot < 8; ++slot) {
      const bool live = slot < 6, behind = slot == 5;
      const double scale = std::ldexp(1.0, uncomp::vote_scale_bits(2));
      REQUIRE(std::abs(got[0][slot].item<int>() / scale - (live && !behind ? weight[slot] : 0.0)) < 1e-6);
      REQUIRE(std::abs(got[1][slot].item<int>() / scale - (live ? weight[8 + slot] : 0.0)) < 1e-6);
      REQUIRE(total[slot].item<int>() == got[0][slot].item<int>() + got[1][slot].item<int>());
    }
    REQUIRE(at::equal(order.cpu(), at::tensor({0, 1, 2, 3, 4, 5, 0, 0}, at::kInt)));
    REQUIRE(step.item<int>() == 0);
  }
}
