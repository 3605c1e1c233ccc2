// SPDX-License-Identifier: Apache-2.0
// Every valid token sees all past slots and the new tokens up to itself, each exactly once, whatever the tile it is in.
#include "core/query_tiles.h"

#include <random>
#include <vector>

#include "support/catch.hpp"

using namespace uncomp;

namespace {

void check(int32_t group, int32_t seq_len, int32_t first, int32_t count, int32_t past, bool has_new, int32_t parts) {
  for (int32_t m_begin = 0; m_begin < seq_len * group; m_begin += kQueryTile) {
    const QueryTilePlan plan = plan_query_tile(m_begin, group, seq_len, first, count, past, has_new);
    REQUIRE(part_begin(plan.tiles, 0, parts) == 0);
    REQUIRE(part_begin(plan.tiles, parts, parts) == plan.tiles);
    bool any_valid = false;
    for (int32_t m = m_begin; m < std::min(m_begin + kQueryTile, seq_len * group); ++m) {
      const int32_t token = m / group;
      if (token < first || token >= first + count) continue;
      any_valid = true;
      int32_t next_past = 0, next_new = 0;
      for (int32_t part = 0; part < parts; ++part) {
        const int32_t end = part_begin(plan.tiles, part + 1, parts);
        for (int32_t i = part_begin(plan.tiles, part, parts); i < end; ++i) {
          const KeyTile tile = plan.at(i);
          REQUIRE(tile.live >= 1);
          REQUIRE(tile.live <= kKeyTile);
          const int32_t seen = visible_keys(tile, token, first);
          REQUIRE(seen >= 0);
          REQUIRE(seen <= tile.live);
          int32_t& next = tile.is_new ? next_new : next_past;
          if (seen > 0) REQUIRE(tile.begin == next);
          next += seen;
          if (tile.is_new) REQUIRE(first + tile.begin + tile.live <= first + count);
        }
      }
      REQUIRE(next_past == past);
      REQUIRE(next_new == (has_new ? token - first + 1 : 0));
    }
    REQUIRE((plan.tiles > 0) == (any_valid && (past > 0 || has_new)));
  }
}

}  // namespace

TEST_CASE("borders of tiles, groups and valid tokens", "[query_tiles]") {
  for (const int32_t group : {1, 3, 4, 7, 16}) {
    for (const int32_t past : {0, 1, 63, 64, 65, 200}) {
      for (const bool has_new : {false, true}) {
        check(group, 1, 0, 1, past, has_new, 1);
        check(group, 70, 0, 70, past, has_new, 3);
        check(group, 70, 69, 1, past, has_new, 2);
        check(group, 70, 10, 0, past, has_new, 2);
        check(group, 70, 20, 33, past, has_new, 32);
      }
    }
  }
}

TEST_CASE("random plans", "[query_tiles]") {
  std::mt19937 random(3);
  const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % static_cast<uint32_t>(n)); };
  for (int trial = 0; trial < 300; ++trial) {
    const int32_t seq_len = 1 + below(200), first = below(seq_len + 1), count = below(seq_len - first + 1);
    check(1 + below(16), seq_len, first, count, below(400), below(2) == 0, 1 + below(32));
  }
}

TEST_CASE("the longest tensors do not overflow", "[query_tiles]") {
  constexpr int32_t kMost = 2147483647;
  const QueryTilePlan plan = plan_query_tile(kMost - 63, 1, kMost, 0, kMost, kMost, true);
  REQUIRE(plan.new_len == kMost);
  REQUIRE(plan.past_tiles == 1 << 25);
  REQUIRE(plan.tiles == 1 << 26);
  REQUIRE(plan.at(plan.tiles - 1).live == 63);
  REQUIRE(part_begin(plan.tiles, 32, 32) == plan.tiles);
}
