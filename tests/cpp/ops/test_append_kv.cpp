// SPDX-License-Identifier: Apache-2.0
// New tokens must land behind each row's old ones, and row_len must move on, on every device.
#include "ops/append_kv.h"

#include "support/precompiled.hpp"
#include "support/torch.hpp"

TEST_CASE("rows take the valid tokens of their sequence", "[append_kv]") {
  for (const at::Device device : uncomp::test::devices()) {
    const at::Tensor key = at::randn({2, 1, 3, 16}, device), value = at::randn({2, 1, 3, 8}, device);
    const at::Tensor position = at::tensor({5, 6, 7, 8, 9, 10}, at::kInt).view({2, 3}).to(device);
    const at::Tensor first = at::tensor({1, 0}, at::kInt).to(device), length = at::tensor({2, 0}, at::kInt).to(device);
    const at::Tensor row_start = at::tensor({0, 4, 6}, at::kInt).to(device);
    at::Tensor row_len = at::tensor({1, 2}, at::kInt).to(device), slots = at::full({6}, -1, at::kInt).to(device);
    at::Tensor key_rows = at::zeros({6, 16}, device), value_rows = at::zeros({6, 8}, device);
    uncomp::append_kv_(key, value, position, first, length, row_start, row_len, key_rows, value_rows, slots);
    REQUIRE(at::equal(row_len.cpu(), at::tensor({3, 2}, at::kInt)));
    REQUIRE(at::equal(slots.cpu(), at::tensor({-1, 6, 7, -1, -1, -1}, at::kInt)));
    REQUIRE(at::equal(key_rows.slice(0, 1, 3), key[0][0].slice(0, 1, 3)));
    REQUIRE(at::equal(value_rows.slice(0, 1, 3), value[0][0].slice(0, 1, 3)));
    REQUIRE(key_rows[0].abs().sum().item<float>() == 0);
    REQUIRE(key_rows.slice(0, 3).abs().sum().item<float>() == 0);
  }
}

TEST_CASE("a full row is a ValueError that names it", "[append_kv]") {
  const at::Tensor key = at::zeros({1, 1, 1, 4}), starts = at::tensor({0, 2}, at::kInt);
  at::Tensor row_len = at::tensor({2}, at::kInt), rows = at::zeros({2, 4}), slots = at::zeros({2}, at::kInt);
  at::Tensor value_rows = at::zeros({2, 4});
  REQUIRE_THROWS_WITH(
      uncomp::append_kv_(key, key, at::zeros({1, 1}, at::kInt), {}, {}, starts, row_len, rows, value_rows, slots),
      uncomp::test::ContainsSubstring("row 0 has 2 of 2 slots taken and gets 1 more"));
}
