// SPDX-License-Identifier: Apache-2.0
// The Gram kernel's plan must cover every lower block once and every token once.
#include "core/gram.h"

#include <set>
#include <utility>

#include "support/catch.hpp"

using namespace uncomp;

namespace {

template <int kTile>
void check_plan() {
  using Plan = GramPlan<kTile>;
  std::set<std::pair<int, int>> seen;
  for (int warp = 0; warp < Plan::kWarps; ++warp) {
    REQUIRE(Plan::slots(warp) <= Plan::kSlots);
    REQUIRE(Plan::split(warp) >= 0);
    for (int slot = 0; slot < Plan::slots(warp); ++slot) {
      const int row = Plan::block_row(warp, slot), column = Plan::block_column(warp, slot);
      REQUIRE((column >= 0 && column <= row && row < Plan::kSide));
      REQUIRE(seen.emplace(row, column).second);
    }
  }
  REQUIRE(static_cast<int>(seen.size()) == Plan::kSide * (Plan::kSide + 1) / 2);
}

}  // namespace

TEST_CASE("every 16 x 16 block of the lower triangle has exactly one owner", "[gram]") {
  check_plan<64>();
  check_plan<128>();
  check_plan<256>();
}

TEST_CASE("chunks cover all tokens in order, in multiples", "[gram]") {
  for (const int count : {0, 1, 63, 64, 65, 1000, 4096, 131072, 2147483647}) {
    for (const int chunks : {1, 2, 7, 33, 256}) {
      for (const int multiple : {1, 32, 64}) {
        int end = 0;
        for (int c = 0; c < chunks; ++c) {
          const TokenRange range = chunk_range(count, chunks, multiple, c);
          REQUIRE(range.begin == end);
          REQUIRE(range.end >= range.begin);
          REQUIRE((range.begin % multiple == 0 || range.begin == count));
          end = range.end;
        }
        REQUIRE(end == count);
      }
    }
  }
}
