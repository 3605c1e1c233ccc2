// SPDX-License-Identifier: Apache-2.0
// From C++ a step must do what it does from Python: the tie vector of the method, and the state it leaves.
#include "ops/decode_evict.h"

#include <cmath>
#include <vector>

#include "support/precompiled.hpp"
#include "support/torch.hpp"

namespace {

struct Row {
  at::Tensor row_start, row_len, keys, values, position, votes, vote_sum, vote_step, order;
};

/// One row of tokens 0 .. K-1 whose logit under a query of e_0 is ln of the given weight.
Row row_of(const std::vector<float>& weights, at::Device device) {
  const int64_t len = static_cast<int64_t>(weights.size());
  const auto ints = at::device(device).dtype(at::kInt);
  at::Tensor keys = at::zeros({len, 64});
  keys.select(1, 0).copy_(at::tensor(weights).log());
  return {at::tensor({int64_t{0}, len}, at::kInt).to(device),
          at::full({1}, len, ints),
          keys.to(device),
          at::ones({len, 64}, at::device(device)),
          at::arange(len, ints),
          at::zeros({1, len}, ints),
          at::zeros({len}, ints),
          at::zeros({1}, ints),
          at::arange(len, ints)};
}

}  // namespace

TEST_CASE("the worked tie: token 2 leaves, its slot is taken over, order moves up", "[decode_evict]") {
  for (const at::Device device : uncomp::test::devices()) {
    Row row = row_of({0.2f, 0.1f, 0.1f, 0.1f, 0.1f}, device);
    at::Tensor query = at::zeros({1, 1, 1, 64}), key = at::zeros({1, 1, 1, 64});
    query[0][0][0][0] = 1;
    key[0][0][0][0] = std::log(0.4f);
    const auto [out, lse] = uncomp::decode_evict_(
        query.to(device), key.to(device), at::full({1, 1, 1, 64}, 3.0f, at::device(device)),
        at::full({1}, 5, at::device(device).dtype(at::kInt)), row.row_start, row.row_len, row.keys, row.values,
        row.position, row.votes, row.vote_sum, row.vote_step, row.order, 1, 0, 3, 1.0, "max", "mean");
    REQUIRE(std::abs(lse.item<float>()) < 1e-5f);
    REQUIRE(std::abs(out.cpu()[0][0][0][0].item<float>() - (0.6f + 0.4f * 3.0f)) < 1e-4f);
    REQUIRE(at::equal(row.position.cpu(), at::tensor({0, 1, 5, 3, 4}, at::kInt)));
    REQUIRE(at::equal(row.order.cpu(), at::tensor({0, 1, 3, 4, 2}, at::kInt)));
    REQUIRE(at::equal(row.values.cpu().select(1, 7), at::tensor({1.0f, 1.0f, 3.0f, 1.0f, 1.0f})));
    REQUIRE(row.row_len.item<int>() == 5);
    REQUIRE(at::equal(row.votes.cpu()[0], row.vote_sum.cpu()));
  }
}

TEST_CASE("an even pool is a ValueError that names it", "[decode_evict]") {
  Row row = row_of({0.5f, 0.5f}, at::kCPU);
  const at::Tensor token = at::zeros({1, 1, 1, 64});
  REQUIRE_THROWS_WITH(uncomp::decode_evict_(token, token, token, at::zeros({1}, at::kInt), row.row_start, row.row_len,
                                            row.keys, row.values, row.position, row.votes, row.vote_sum, row.vote_step,
                                            row.order, 1, 0, 4, 1.0, "max", "mean"),
                      uncomp::test::ContainsSubstring("uncomp::decode_evict_: pool must be odd and at least 1; got 4"));
}
