// SPDX-License-Identifier: Apache-2.0
// One new token must equal decode_attention, and past and new tokens joined must equal one attention over both.
#include "ops/ragged_attention.h"

#include <limits>

#include "ops/decode_attention.h"
#include "support/precompiled.hpp"
#include "support/torch.hpp"

namespace {

struct Past {
  at::Tensor key_rows, value_rows, row_start, row_len;
};

Past make_past(at::Device device, const std::vector<int32_t>& lengths, int64_t dim) {
  std::vector<int32_t> start{0};
  for (const int32_t n : lengths) start.push_back(start.back() + n);
  const at::TensorOptions options = at::device(device).dtype(at::kFloat);
  return {at::randn({start.back(), dim}, options), at::randn({start.back(), dim}, options),
          at::tensor(start, at::kInt).to(device), at::tensor(lengths, at::kInt).to(device)};
}

}  // namespace

TEST_CASE("one new token without new keys is decode_attention", "[ragged_attention]") {
  for (const at::Device device : uncomp::test::devices()) {
    const Past p = make_past(device, {70, 0, 5, 200}, 32);
    const at::Tensor query = at::randn({2, 6, 1, 32}, at::device(device).dtype(at::kFloat));
    const auto [out, lse] =
        uncomp::ragged_attention(query, {}, {}, {}, {}, {}, {}, p.key_rows, p.value_rows, p.row_start, p.row_len, 0.2);
    const auto [want, want_lse] =
        uncomp::decode_attention(query, p.key_rows, p.value_rows, p.row_start, p.row_len, 0.2);
    REQUIRE(at::allclose(out, want, 1e-5, 1e-6));
    REQUIRE(at::allclose(lse.squeeze(2), want_lse, 1e-5, 1e-6));
  }
}

TEST_CASE("new tokens joined here and joined from elsewhere agree", "[ragged_attention]") {
  for (const at::Device device : uncomp::test::devices()) {
    const at::TensorOptions options = at::device(device).dtype(at::kFloat);
    const Past past = make_past(device, {70, 131}, 32), none = make_past(device, {0, 0}, 32);
    const at::Tensor query = at::randn({1, 6, 66, 32}, options), key = at::randn({1, 2, 66, 32}, options),
                     value = at::randn({1, 2, 66, 32}, options);
    const auto [out, lse] = uncomp::ragged_attention(query, key, value, {}, {}, {}, {}, past.key_rows, past.value_rows,
                                                     past.row_start, past.row_len, 0.2);
    const auto [fresh, fresh_lse] = uncomp::ragged_attention(query, key, value, {}, {}, {}, {}, none.key_rows,
                                                             none.value_rows, none.row_start, none.row_len, 0.2);
    const auto [joined, joined_lse] = uncomp::ragged_attention(query, {}, {}, fresh, fresh_lse, {}, {}, past.key_rows,
                                                               past.value_rows, past.row_start, past.row_len, 0.2);
    REQUIRE(at::allclose(out, joined, 1e-4, 1e-5));
    REQUIRE(at::allclose(lse, joined_lse, 1e-4, 1e-5));
  }
}

TEST_CASE("half a pair is refused by name", "[ragged_attention]") {
  const Past p = make_past(at::kCPU, {3}, 8);
  const at::Tensor query = at::randn({1, 1, 2, 8});
  REQUIRE_THROWS_WITH(
      uncomp::ragged_attention(query, query, {}, {}, {}, {}, {}, p.key_rows, p.value_rows, p.row_start, p.row_len, 1.0),
      uncomp::test::ContainsSubstring("key and value must be given together; got only key"));
}
