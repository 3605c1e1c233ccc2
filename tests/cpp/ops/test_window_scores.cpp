// SPDX-License-Identifier: Apache-2.0
// The C++ door: worked vector, both layouts, and errors that name the argument, on every device.
#include "ops/window_scores.h"

#include "support/precompiled.hpp"
#include "support/torch.hpp"

namespace {

/// Queries whose softmax weights on identity keys are the p rows of the method's worked vector.
at::Tensor worked_query(const at::Device& device) {
  const at::Tensor p = at::tensor({.20, .05, .02, .03, .25, .10, .05, .06, .24, .00, 1., 1., 1., 1., 1., 1.,
                                   .15, .04, .03, .04, .22, .08, .12, .07, .10, .15, 1., 1., 1., 1., 1., 1.});
  return p.to(at::kFloat).clamp_min(1e-30).log().view({1, 1, 2, 16}).to(device);
}

}  // namespace

TEST_CASE("the worked vector comes out for dense keys and for an arena", "[window_scores]") {
  for (const at::Device device : uncomp::test::devices()) {
    const at::Tensor key = at::eye(10, 16, at::device(device));
    const at::Tensor want = at::tensor({.35, .09, .05, .07, .47, .18, .17, .13, .34, .15}).to(at::kFloat).view({1, 10});
    const auto [dense, lse] = uncomp::window_scores(worked_query(device), key.view({1, 1, 10, 16}), {}, {}, {}, {}, {},
                                                    0, 1.0, "sum", "mean");
    REQUIRE(at::allclose(dense.cpu(), want, 0, 1e-6));
    REQUIRE(at::allclose(lse.cpu(), at::zeros({1, 1, 2}), 0, 1e-6));
    const at::Tensor start = at::tensor({0, 10}, at::kInt).to(device), len = at::tensor({10}, at::kInt).to(device);
    const auto [rows, lse_of_rows] =
        uncomp::window_scores(worked_query(device), key, {}, {}, {}, start, len, 12, 1.0, "mean", "max");
    REQUIRE(at::allclose(rows.cpu().narrow(1, 0, 10), want / 2, 0, 1e-6));
    REQUIRE(at::equal(rows.cpu().narrow(1, 10, 2), at::zeros({1, 2})));
    REQUIRE(at::allclose(lse_of_rows.cpu(), lse.cpu(), 0, 1e-6));
  }
}

TEST_CASE("columns without an arena are refused", "[window_scores]") {
  const at::Tensor query = at::zeros({1, 1, 2, 16}), key = at::zeros({1, 1, 4, 16});
  REQUIRE_THROWS_WITH(uncomp::window_scores(query, key, {}, {}, {}, {}, {}, 4, 1.0, "sum", "mean"),
                      uncomp::test::ContainsSubstring("uncomp::window_scores: columns must be 0 for a dense key"));
}
