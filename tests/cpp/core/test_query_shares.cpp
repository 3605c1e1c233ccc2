// SPDX-License-Identifier: Apache-2.0
// Shares cover every unit of every query tile exactly once and in order, whatever the lengths.
#include "core/query_shares.h"

#include <random>
#include <set>
#include <vector>

#include "support/catch.hpp"

using namespace uncomp;

namespace {

/// Deals tiles of so many units to workers and looks at every part.
void check_shares(const std::vector<int32_t>& units, int32_t workers) {
  int64_t total = 0;
  for (const int32_t n : units) total += n;
  const int64_t most = share_units(total, workers);
  REQUIRE(most * workers >= total);
  size_t tile = 0;
  int32_t done = 0, last_worker = -1;
  std::set<int32_t> places;
  for (int32_t worker = 0; worker < workers; ++worker) {
    for (int64_t left = min_of(most, total - min_of(total, worker * most)); left > 0;) {
      REQUIRE(tile < units.size());
      const TilePart part = next_part(units[tile], done, left);
      REQUIRE(part.begin == done);
      REQUIRE(part.end > part.begin);
      REQUIRE(part.end <= units[tile]);
      if (part.begin > 0) REQUIRE(worker == last_worker + 1);
      if (!part.whole()) REQUIRE(places.insert(part.place(worker)).second);
      if (!part.whole()) REQUIRE(part.place(worker) == 2 * worker + (part.begin == 0));
      left -= part.end - part.begin;
      done = part.end;
      last_worker = worker;
      if (done == units[tile]) {
        ++tile;
        done = 0;
      }
    }
  }
  REQUIRE(tile == units.size());
}

struct UnitShape {
  int32_t queries, keys;
};

void check_tile(UnitShape shape, int32_t group, int32_t seq_len, int32_t first, int32_t count, int32_t past,
                bool has_new) {
  for (int32_t m_begin = 0; m_begin < seq_len * group; m_begin += shape.queries) {
    const QueryTileKeys keys = query_tile_keys(shape.keys, m_begin / group, (m_begin + shape.queries - 1) / group,
                                               first, count, past, has_new);
    REQUIRE(keys.units() >= 1);
    bool any_valid = false;
    for (int32_t m = m_begin; m < std::min(m_begin + shape.queries, seq_len * group); ++m) {
      const int32_t token = m / group;
      if (token < first || token >= first + count) continue;
      any_valid = true;
      int32_t next_past = 0, next_new = 0;
      for (int32_t i = 0; i < keys.tiles; ++i) {
        const KeyTile tile = keys.at(i, shape.keys);
        REQUIRE(tile.live >= 1);
        REQUIRE(tile.live <= shape.keys);
        const int32_t seen = visible_keys(tile, token, first);
        int32_t& next = tile.is_new ? next_new : next_past;
        if (seen > 0) REQUIRE(tile.begin == next);
        next += seen;
        if (tile.is_new) REQUIRE(first + tile.begin + tile.live <= first + count);
      }
      REQUIRE(next_past == past);
      REQUIRE(next_new == (has_new ? token - first + 1 : 0));
    }
    REQUIRE((keys.tiles > 0) == (any_valid && (past > 0 || has_new)));
  }
}

}  // namespace

TEST_CASE("shares of tiles of every size", "[query_shares]") {
  check_shares({1}, 132);
  check_shares(std::vector<int32_t>(128, 13), 132);
  check_shares(std::vector<int32_t>(8, 256), 132);
  check_shares({100000, 1, 1, 1}, 132);
  check_shares({1, 1, 1, 100000}, 7);
  std::mt19937 random(5);
  const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % static_cast<uint32_t>(n)); };
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<int32_t> units;
    for (int32_t n = 1 + below(300); n > 0; --n) units.push_back(1 + below(below(40) + 1));
    check_shares(units, 1 + below(150));
  }
}

TEST_CASE("keys of a query tile at the borders of tiles, groups and valid tokens", "[query_shares]") {
  for (const UnitShape shape : {UnitShape{64, 128}, UnitShape{128, 128}, UnitShape{128, 64}}) {
    for (const int32_t group : {1, 3, 4, 7, 16}) {
      for (const int32_t past : {0, 1, 127, 128, 129, 300}) {
        for (const bool has_new : {false, true}) {
          check_tile(shape, group, 1, 0, 1, past, has_new);
          check_tile(shape, group, 70, 0, 70, past, has_new);
          check_tile(shape, group, 70, 69, 1, past, has_new);
          check_tile(shape, group, 70, 10, 0, past, has_new);
          check_tile(shape, group, 70, 20, 33, past, has_new);
        }
      }
    }
  }
}

TEST_CASE("query tiles of the longest tensors do not overflow", "[query_shares]") {
  constexpr int32_t kMost = 2147483647;
  const QueryTileKeys keys = query_tile_keys(128, kMost - 128, kMost - 1, 0, kMost, kMost, true);
  REQUIRE(keys.new_len == kMost);
  REQUIRE(keys.past_tiles == 1 << 24);
  REQUIRE(keys.tiles == 1 << 25);
  REQUIRE(keys.at(keys.tiles - 1, 128).live == 127);
  REQUIRE(share_units(int64_t{1} << 56, 132) * 132 >= int64_t{1} << 56);
}

TEST_CASE("division by multiplication is exact", "[query_shares]") {
  constexpr int32_t kMost = 2147483647;
  for (const int32_t by :
       {1, 2, 3, 5, 6, 7, 11, 13, 15, 16, 17, 1000, 65537, (1 << 30) - 1, 1 << 30, (1 << 30) + 1, kMost}) {
    const Divisor divide = divisor(by);
    for (const int32_t n : {0, 1, by - 1, by, kMost / by * by - 1, kMost / by * by, kMost - 1, kMost}) {
      REQUIRE(divide.divide(n) == n / by);
    }
    for (int64_t n = 0; n <= kMost; n += 1000003) {
      REQUIRE(divide.divide(static_cast<int32_t>(n)) == static_cast<int32_t>(n) / by);
    }
  }
}
