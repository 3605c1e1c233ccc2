// SPDX-License-Identifier: Apache-2.0
// The launch itself: tiles of rows, strided rankings, ties, NaN, guard bands.
#include "kernels/group_heads.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "core/budget.h"
#include "core/select_keys.h"
#include "support/catch.hpp"
#include "support/device.hpp"

using namespace uncomp;
using namespace uncomp::test;

TEST_CASE("ranks equal a stable sort and nothing else is written", "[group_heads]") {
  std::mt19937 random(3);
  for (const int32_t rows : {1, 31, 32, 33, 255, 256, 257, 1000, 1024, 1025, 2500}) {
    const int32_t count = 3, stride = rows + 5, groups = std::min(rows, 7);
    std::vector<float> values(static_cast<size_t>(count) * stride);
    for (float& v : values) v = random() % 11 == 0 ? std::nanf("") : static_cast<float>(random() % 64) - 20;
    DeviceArray<float> entropy(values);
    DeviceArray<int32_t> group(static_cast<size_t>(count) * rows), rank(static_cast<size_t>(count) * rows);
    for (const bool reverse : {false, true}) {
      cuda_ok(kernels::group_heads({entropy.data(), group.data(), rank.data(), stride, count, rows, groups, reverse},
                                   nullptr));
      const std::vector<int32_t> got_group = group.host(), got_rank = rank.host();
      for (int32_t n = 0; n < count; ++n) {
        std::vector<int32_t> order(rows);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
          return rank_key(values[n * stride + a]) < rank_key(values[n * stride + b]);
        });
        for (int32_t place = 0; place < rows; ++place) {
          const int32_t at = n * rows + order[place], g = GroupSizes(rows, groups).group_of(place);
          if (got_rank[at] != place || got_group[at] != (reverse ? groups - 1 - g : g)) {
            FAIL("rows " << rows << " ranking " << n << " row " << order[place]);
          }
        }
      }
    }
    REQUIRE(group.guards_intact());
    REQUIRE(rank.guards_intact());
  }
}
