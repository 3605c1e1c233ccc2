// SPDX-License-Identifier: Apache-2.0
// Kept tokens of dense keys, and of an arena made from them, must arrive bit-equal on every device.
#include "ops/compact_kv.h"

#include "support/precompiled.hpp"
#include "support/torch.hpp"

namespace {

at::Tensor ints(std::vector<int64_t> values, at::Device device) { return at::tensor(values, at::kInt).to(device); }

}  // namespace

TEST_CASE("dense rows are packed, and packed rows once more", "[compact_kv]") {
  for (const at::Device device : uncomp::test::devices()) {
    const at::Tensor key = at::randn({1, 6, 2, 24}, at::device(device).dtype(at::kHalf)).transpose(1, 2);
    const at::Tensor value = at::randn({1, 2, 6, 40}, at::device(device).dtype(at::kHalf));
    const at::Tensor first = ints({1}, device);
    const auto [key_rows, value_rows, position, row_len] = uncomp::compact_kv(
        key, value, {}, first, {}, ints({0, 4, 2}, device), ints({0, 2, 3}, device), ints({0, 3, 5}, device), 5);
    REQUIRE(at::equal(key_rows[1], key[0][0][5]));
    REQUIRE(at::equal(value_rows[3], value[0][1][3]));
    REQUIRE(row_len.cpu()[0].item<int>() == 2);
    REQUIRE(position.cpu()[1].item<int>() == 4);

    const auto [keys_again, values_again, position_again, len_again] =
        uncomp::compact_kv(key_rows, value_rows, position, {}, ints({0, 2, 5}, device), ints({1, 1}, device),
                           ints({0, 2, 2}, device), ints({0, 2, 2}, device), 2);
    REQUIRE(at::equal(keys_again[0], key[0][0][5]));
    REQUIRE(at::equal(values_again[1], value[0][0][5]));
    REQUIRE(position_again.cpu()[1].item<int>() == 4);
    REQUIRE(len_again.cpu()[1].item<int>() == 0);
  }
}

TEST_CASE("an arena needs its positions", "[compact_kv]") {
  const at::Tensor rows = at::zeros({4, 8}), starts = ints({0, 2}, at::kCPU);
  REQUIRE_THROWS_WITH(uncomp::compact_kv(rows, rows, {}, {}, starts, starts, starts, starts, 2),
                      uncomp::test::ContainsSubstring("uncomp::compact_kv: position must be given"));
}
