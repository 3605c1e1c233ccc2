// SPDX-License-Identifier: Apache-2.0
// Who leaves a row is a rule of integers: it must be the same on every device, for every row length.
#include "core/eviction.h"

#include <algorithm>
#include <climits>
#include <random>
#include <vector>

#include "support/catch.hpp"

using namespace uncomp;
using Kind = EvictStep::Kind;

TEST_CASE("the ring row lies in the ring for every counter and moves by one", "[eviction]") {
  for (const int32_t window : {1, 2, 3, 8, 64}) {
    for (const int32_t step : {0, 1, 7, 63, 64, 1000, INT32_MAX, -1, -64, INT32_MIN}) {
      const int32_t row = vote_ring_row(step, window);
      REQUIRE(row >= 0);
      REQUIRE(row < window);
      REQUIRE(vote_ring_row(row + 1, window) == (row + 1 == window ? 0 : row + 1));
    }
  }
}

TEST_CASE("a row without room does nothing, one with room appends, a full one evicts", "[eviction]") {
  REQUIRE(evict_step(5, 0, 2, 0).kind == Kind::nothing);
  REQUIRE(evict_step(5, -3, 2, 0).kind == Kind::nothing);
  REQUIRE(evict_step(0, 1, 1, 0).kind == Kind::append);
  REQUIRE(evict_step(-7, 3, 1, 0).len == 0);
  REQUIRE(evict_step(3, 4, 2, 0).kind == Kind::append);
  REQUIRE(evict_step(9, 4, 2, 0).kind == Kind::evict);
  REQUIRE(evict_step(9, 4, 2, 0).len == 4);
}

TEST_CASE("window and sinks stay; room = window + sink leaves exactly one choice", "[eviction]") {
  for (int32_t room = 1; room <= 12; ++room) {
    for (int32_t window = 1; window <= 14; ++window) {
      for (int32_t sink = 0; sink <= 14; ++sink) {
        const EvictStep step = evict_step(room, room, window, sink);
        REQUIRE(step.kind == Kind::evict);
        REQUIRE(step.first >= 0);
        REQUIRE(step.first < step.candidates);
        REQUIRE(step.candidates <= room);
        if (room >= window + sink) {
          REQUIRE(step.first == sink);
          REQUIRE(step.candidates == room + 1 - window);
        } else {
          REQUIRE(step.first == (sink < room ? sink : 0));
          REQUIRE(step.candidates == step.first + 1);
        }
        if (room == window + sink) REQUIRE(step.candidates - step.first == 1);
      }
    }
  }
  REQUIRE(evict_step(INT32_MAX, INT32_MAX, 1, 0).candidates == INT32_MAX);
}

TEST_CASE("a pool is cut at both ends of the candidates", "[eviction]") {
  const EvictStep step = evict_step(9, 9, 2, 0);
  REQUIRE(step.candidates == 8);
  REQUIRE(step.pool_begin(0, 1) == 0);
  REQUIRE(step.pool_end(0, 1) == 2);
  REQUIRE(step.pool_begin(7, 3) == 4);
  REQUIRE(step.pool_end(7, 3) == 8);
  REQUIRE(step.pool_end(3, 64) == 8);
  const EvictStep longest = evict_step(INT32_MAX, INT32_MAX, 1, 0);
  REQUIRE(longest.pool_end(INT32_MAX - 1, 64) == INT32_MAX);
}

TEST_CASE("the smallest score leaves, among equals the oldest", "[eviction]") {
  REQUIRE(leaves_before({3, 9}, {4, 1}));
  REQUIRE(leaves_before({3, 1}, {3, 2}));
  REQUIRE_FALSE(leaves_before({3, 1}, {3, 1}));
  REQUIRE(leaves_before({INT64_MAX - 1, 0}, kNobody));
}

TEST_CASE("removing a place chunk by chunk in ascending order equals erase", "[eviction]") {
  // The kernel reads a chunk into registers, waits, then writes it: emulated with a small chunk.
  std::mt19937 random(3);
  for (int trial = 0; trial < 300; ++trial) {
    const int32_t len = 1 + static_cast<int32_t>(random() % 40), removed = static_cast<int32_t>(random() % len);
    const int32_t chunk = 1 + static_cast<int32_t>(random() % 9);
    std::vector<int32_t> order(len), want;
    for (int32_t i = 0; i < len; ++i) order[i] = i * 7;
    want = order;
    want.erase(want.begin() + removed);
    want.push_back(-1);
    for (int32_t base = removed; base < len - 1; base += chunk) {
      std::vector<int32_t> held;
      for (int32_t i = base; i < std::min(base + chunk, len - 1); ++i) held.push_back(order[order_source(i, removed)]);
      for (size_t i = 0; i < held.size(); ++i) order[base + i] = held[i];
    }
    order[len - 1] = -1;
    REQUIRE(order == want);
  }
}

TEST_CASE("slices cover every tile once, in order, and never more than allowed", "[eviction]") {
  for (const int32_t len : {0, 1, 15, 16, 17, 63, 64, 65, 1552, 32768, 1 << 20, INT32_MAX - kRankTile}) {
    for (const int32_t most : {1, 2, 3, 33, 64}) {
      const RowSlices slices = row_slices(len, most, 16, 4);
      REQUIRE(slices.count <= most);
      REQUIRE((slices.count == 0) == (len == 0));
      REQUIRE(int64_t{slices.tiles} * 16 >= len);
      REQUIRE(int64_t{slices.tiles} * 16 < int64_t{len} + 16);
      int32_t next = 0;
      for (int32_t s = 0; s < slices.count; ++s) {
        REQUIRE(slices.begin(s) == next);
        REQUIRE(slices.end(s) > next);
        next = slices.end(s);
      }
      REQUIRE(next == slices.tiles);
      REQUIRE(slices.begin(slices.count) == slices.end(slices.count));
    }
  }
}

TEST_CASE("few rows are shared by blocks, many are not, and only long rows share their votes", "[eviction]") {
  const auto slices = [](int32_t num_rows, int64_t mean, int32_t len) {
    return attend_slices(len, evict_plan(num_rows, num_rows * mean, 264)).count;
  };
  REQUIRE(evict_plan(0, 0, 264).most_slices == 1);
  REQUIRE(slices(8, 1552, 1552) == 25);
  REQUIRE(slices(8, 32768, 32768) == 32);
  REQUIRE(slices(256, 1552, 2070) == 2);
  REQUIRE(slices(256, 1552, 1034) == 1);
  REQUIRE(slices(2048, 1552, 1552) == 1);
  REQUIRE(slices(8, 32768, 32768 * 8 * 8 / 15) == 122);  // of 18 tiles
  REQUIRE(slices(1, 1 << 20, 1 << 20) == 128);
  REQUIRE(evict_plan(8, 8 * 1552, 264).vote_slices == 1);
  REQUIRE(evict_plan(1, 1 << 20, 264).vote_slices == 128);
  REQUIRE(evict_plan(8, 8 * 32768, 264).vote_slices == 8);
  REQUIRE(evict_plan(2048, 2048 * 32768ll, 264).vote_slices == 1);
  for (int32_t rows = 1; rows < 5000; rows += 7) {
    const EvictPlan plan = evict_plan(rows, int64_t{rows} * 1552, 264);
    REQUIRE(int64_t{rows} * plan.most_slices <= 4 * 264 + rows);
  }
}

TEST_CASE("ranks fill the device and keep rows on chip", "[eviction]") {
  const auto ranks = [](int32_t rows, int64_t mean) { return rank_count(rows, rows * mean, 264, 2628, kMostRanks); };
  REQUIRE(rank_count(0, 0, 264, 2628, kMostRanks) == 1);
  REQUIRE(ranks(8, 1552) == 16);
  REQUIRE(ranks(16, 1552) == 16);
  REQUIRE(ranks(17, 1552) == 8);
  REQUIRE(ranks(33, 1552) == 8);
  REQUIRE(ranks(34, 1552) == 4);
  REQUIRE(ranks(132, 1552) == 2);
  REQUIRE(ranks(133, 1552) == 1);
  REQUIRE(ranks(2048, 1552) == 1);
  REQUIRE(ranks(2048, 1577) == 1);
  REQUIRE(ranks(2048, 1578) == 2);  // rows of 5/3 of the mean would not fit
  REQUIRE(ranks(2048, 8192) == 8);
  REQUIRE(ranks(2048, 1 << 20) == 1);  // nothing helps
  REQUIRE(rank_count(8, 8 * 1552, 264, 2628, 1) == 1);

  const auto pays = [&](int32_t rows, int64_t mean) {
    const RankPlan plan{ranks(rows, mean), 0, 2628, 0, 0, 0};
    return row_launch_pays(rows, rows * mean, 132, plan);
  };
  REQUIRE(pays(1, 4096));
  REQUIRE_FALSE(pays(1, 4097));
  REQUIRE(pays(8, 32768));
  REQUIRE_FALSE(pays(8, 131072));
  REQUIRE(pays(2048, 1552));
}

TEST_CASE("rank slices cover a row with whole tiles", "[eviction]") {
  for (const int32_t len : {0, 1, 15, 16, 17, 255, 256, 257, 1552, 32768, 1 << 20, INT32_MAX - kRankTile}) {
    for (int32_t bits = 0; bits <= 4; ++bits) {
      const int32_t ranks = 1 << bits;
      const int64_t slice = rank_slice(len, bits);
      REQUIRE(slice % kRankTile == 0);
      REQUIRE(slice * ranks >= len);
      REQUIRE((slice - kRankTile) * ranks < max_of(len, 1));
    }
  }
}

TEST_CASE("a quotient by a product is exact where it is used", "[eviction]") {
  for (int32_t divisor = 1; divisor <= (1 << 15); divisor = divisor < 40 ? divisor + 1 : divisor * 3 / 2 + 1) {
    const float inverse = 1.0f / static_cast<float>(divisor);
    for (int32_t quotient = 0; quotient < 16; ++quotient) {
      for (const int32_t rest : {0, 1, divisor / 2, divisor - 2, divisor - 1}) {
        if (rest < 0 || rest >= divisor) continue;
        REQUIRE(small_quotient(quotient * divisor + rest, inverse) == quotient);
      }
    }
  }
  // Slices of a row divide its slots: every divisor, at both ends.
  for (int32_t divisor = 1; divisor <= (1 << 15); ++divisor) {
    const float inverse = 1.0f / static_cast<float>(divisor);
    REQUIRE(small_quotient(15 * divisor, inverse) == 15);
    REQUIRE(small_quotient(16 * divisor - 1, inverse) == 15);
  }
}

TEST_CASE("a late start is a multiprocessor's part of the time of a stream, and bounded", "[eviction]") {
  static_assert(late_clocks(0, 512) == 0);
  static_assert(late_clocks(1552, 512) == 39731);
  static_assert(late_clocks(INT32_MAX, 1024) == 1 << 20);
}
