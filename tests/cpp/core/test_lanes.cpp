// SPDX-License-Identifier: Apache-2.0
// Every byte of every token must have exactly one lane, and no access may be wider than its alignment.
#include "core/lanes.h"

#include <set>
#include <vector>

#include "core/ragged.h"
#include "support/catch.hpp"

using namespace uncomp;

TEST_CASE("the widest access divides every address, stride and size", "[lanes]") {
  STATIC_REQUIRE(common_lane_bytes({}) == 16);
  STATIC_REQUIRE(common_lane_bytes({0, 256, 1024}) == 16);
  STATIC_REQUIRE(common_lane_bytes({256, 40}) == 8);
  STATIC_REQUIRE(common_lane_bytes({256, 12}) == 4);
  STATIC_REQUIRE(common_lane_bytes({6, 256}) == 2);
  STATIC_REQUIRE(common_lane_bytes({256, 7}) == 1);
  STATIC_REQUIRE(common_lane_bytes({int64_t{1} << 40, 24}) == 8);
}

TEST_CASE("a pass of a warp covers neighbouring tokens once, with enough lanes for each", "[lanes]") {
  for (const int32_t lane_bytes : {2, 4, 8, 16}) {
    for (int32_t units = 1; units <= 300; ++units) {
      const int32_t bytes = units * lane_bytes;
      const WarpTokens tokens = WarpTokens::of(bytes, lane_bytes);
      REQUIRE(tokens.lanes() * tokens.side_by_side() == 32);
      REQUIRE((tokens.lanes() == 32 || tokens.lanes() >= units));
      REQUIRE((tokens.lanes() == 1 || tokens.lanes() / 2 < units));
      for (const int32_t count : {0, 1, 3, 4, 127, 128, 129, 1552, INT32_MAX}) {
        REQUIRE(tokens.passes(count) == ceil_div<int64_t>(count, tokens.per_pass()));
      }
      std::vector<std::set<int32_t>> places(tokens.per_pass());
      for (int32_t flight = 0; flight < WarpTokens::kInFlight; ++flight) {
        for (int32_t lane = 0; lane < 32; ++lane) {
          const int32_t token = tokens.token(lane, flight);
          REQUIRE((token >= 0 && token < tokens.per_pass()));
          REQUIRE(token == tokens.token(lane, 0) + flight * tokens.side_by_side());
          REQUIRE(places[token].insert(tokens.place(lane)).second);
        }
      }
      for (const auto& of_token : places) REQUIRE(static_cast<int32_t>(of_token.size()) == tokens.lanes());
    }
  }
}

TEST_CASE("rows of a sequence share its KV heads in blocks of neighbours", "[lanes]") {
  const RowSources one_each{8, 8}, four_each{32, 8};
  REQUIRE(one_each.sequence(15) == 1);
  REQUIRE(one_each.kv_head(15) == 7);
  REQUIRE(four_each.sequence(31) == 0);
  REQUIRE(four_each.kv_head(31) == 7);
  REQUIRE(four_each.kv_head(3) == 0);
  REQUIRE(four_each.kv_head(36) == 1);
  REQUIRE(RowSources{7, 1}.kv_head(13) == 0);
}
