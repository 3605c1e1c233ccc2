// SPDX-License-Identifier: Apache-2.0
// Every token of every row must be met by exactly one run, and every query by exactly one place of a tile.
#include "core/window.h"

#include <random>
#include <vector>

#include "core/dispatch.h"
#include "core/stream_plan.h"
#include "support/catch.hpp"

using namespace uncomp;

TEST_CASE("runs cover the room of each arena row exactly once, however skewed", "[window]") {
  std::mt19937 random(3);
  for (int trial = 0; trial < 300; ++trial) {
    const int32_t num_rows = 1 + static_cast<int32_t>(random() % 9), run = 1 << (random() % 8);
    std::vector<int32_t> start{static_cast<int32_t>(random() % 5)}, len;
    for (int32_t r = 0; r < num_rows; ++r) {
      const int32_t room = random() % 3 == 0 ? 0 : static_cast<int32_t>(random() % 700);
      start.push_back(start.back() + room);
      len.push_back(room);
    }
    const int64_t capacity = start.back() + random() % 50;
    const RowRuns runs{{{start.data(), len.data(), capacity, num_rows}, {}, 1}, num_rows, run};
    std::vector<int> seen(capacity, 0), first_runs(num_rows, 0);
    for (int64_t item = 0; item < runs.items(); ++item) {
      const RowRun at = runs.at(item);
      if (at.row < 0) continue;
      REQUIRE(at.row < num_rows);
      REQUIRE(runs.first_item(at.row) + at.first / run == item);
      first_runs[at.row] += at.first == 0;
      for (int32_t t = at.first; t < min_of(at.first + run, runs.rows.count(at.row)); ++t) ++seen[start[at.row] + t];
    }
    for (int64_t slot = 0; slot < capacity; ++slot) REQUIRE(seen[slot] == (slot >= start[0] && slot < start.back()));
    for (int32_t r = 0; r < num_rows; ++r) REQUIRE(first_runs[r] == 1);
  }
}

TEST_CASE("wild starts never lead outside the arena", "[window]") {
  const int32_t start[] = {0, 50, 20, -9, 2147483647, 40, 7}, len[] = {2147483647, 3, -1, 7, 9, 9};
  const RowRuns runs{{{start, len, 131, 6}, {}, 2}, 6, 64};
  for (int64_t item = 0; item < runs.items(); ++item) {
    const RowRun at = runs.at(item);
    if (at.row < 0) continue;
    REQUIRE(at.row < 6);
    const int32_t n = runs.rows.count(at.row);
    if (at.first < n) REQUIRE(runs.rows.offset(at.row, {0, 0, 1}) + n <= 131);
  }
}

TEST_CASE("runs of dense rows number every column of every row once", "[window]") {
  const int32_t first[] = {0, 3}, length[] = {100, 50};
  const TokenRows rows{{}, {first, length, 100}, 3};
  const RowRuns runs{rows, 6, 32};
  REQUIRE(runs.items() == 24);
  for (int64_t item = 0; item < 24; ++item) {
    REQUIRE(runs.at(item).row == item / 4);
    REQUIRE(runs.at(item).first == item % 4 * 32);
  }
  REQUIRE(rows.count(2) == 100);
  REQUIRE(rows.count(3) == 50);
  REQUIRE(rows.offset(4, {10000, 1000, 10}) == 10000 + 1000 + 30);
}

TEST_CASE("a run is whole rounds of a block and leaves enough blocks", "[window]") {
  for (const int tile : kHeadDimTiles) {
    const int32_t round = kWindowWarps * warp_keys(tile);
    REQUIRE(run_tokens(0, tile, 528) == round);
    for (const int64_t tokens : {1000, 100000, 10000000}) {
      const int32_t run = run_tokens(tokens, tile, 528);
      REQUIRE(run % round == 0);
      REQUIRE((run == round || tokens / run >= 528));
      REQUIRE(run <= 16 * round);
    }
  }
}

TEST_CASE("packed tiles hold every query of every head once and fit into the block", "[window]") {
  for (int32_t group = 1; group <= kMaxGroupSize; ++group) {
    for (int32_t window = 1; window <= kMaxWindow; ++window) {
      for (const int tile : kHeadDimTiles) {
        const HeadTiles tiles = HeadTiles::of(group, window, max_block_queries(tile));
        REQUIRE(tiles.heads_per_chunk * tiles.tiles_per_head * kQueryTile <= max_block_queries(tile));
        int32_t heads = 0;
        for (int32_t c = 0; c < tiles.chunks; ++c) {
          REQUIRE(tiles.heads_in(c, group) > 0);
          heads += tiles.heads_in(c, group);
        }
        REQUIRE(heads == group);
        REQUIRE(tiles.tiles_per_head * kQueryTile >= window);
      }
      const VoteTiles votes = VoteTiles::of(group, window);
      int32_t total = 0;
      for (int32_t c = 0; c < votes.chunks; ++c) {
        REQUIRE(votes.tiles_in(c) > 0);
        REQUIRE(votes.tiles_in(c) * group * kQueryTile <= 128);
        total += votes.tiles_in(c);
      }
      REQUIRE(total * kQueryTile >= window);
      REQUIRE((total - 1) * kQueryTile < window);
    }
  }
}

TEST_CASE("eight rows of one column lie in eight bank groups, and a row is permuted onto itself", "[window]") {
  for (const int32_t pieces : {8, 16, 32}) {
    for (int32_t piece = 0; piece < pieces; ++piece) {
      int32_t banks = 0;
      for (int32_t row = 0; row < 8; ++row) banks |= 1 << (swizzled(row, piece) % 8);
      REQUIRE(banks == 255);
    }
    for (int32_t row = 0; row < 16; ++row) {
      std::vector<int> hit(pieces, 0);
      for (int32_t piece = 0; piece < pieces; ++piece) ++hit.at(swizzled(row, piece));
      for (const int count : hit) REQUIRE(count == 1);
    }
  }
}

TEST_CASE("the last query sees every token and older ones stop at themselves", "[window]") {
  REQUIRE(newest_visible(100, 8, 7) == 99);
  REQUIRE(newest_visible(100, 8, 0) == 92);
  REQUIRE(newest_visible(3, 8, 4) == -1);
  REQUIRE(newest_visible(3, 8, 5) == 0);
}

TEST_CASE("a stream's chunks hold every head once, and its teams fit into a block", "[window]") {
  for (int32_t group = 1; group <= kMaxGroupSize; ++group) {
    for (int32_t window = 1; window <= kMaxWindow; ++window) {
      for (const int tile : kHeadDimTiles) {
        const StreamPlan plan = StreamPlan::of(group, window, stream_groups(tile));
        REQUIRE(plan.team >= 1);
        REQUIRE(plan.teams >= 1);
        REQUIRE(plan.team * plan.teams <= stream_groups(tile));
        for (const bool by_8 : {false, true}) {
          REQUIRE(1 << plan.log_places(by_8) >= plan.teams);
          REQUIRE(1 << plan.log_places(by_8) <= 8);
          REQUIRE((plan.lines_of_place(by_8) << plan.log_places(by_8)) <= 32);
          REQUIRE(plan.lines_of_place(by_8) * (by_8 ? 8 : 16) >= plan.rows_in(0, group));
        }
        for (int32_t t = 0; t < 32; ++t) REQUIRE(plan.head_of(t) == t / plan.heads.tiles_per_head);
        int32_t heads = 0;
        for (int32_t c = 0; c < plan.heads.chunks; ++c) {
          REQUIRE(plan.rows_in(c, group) <= 64 * plan.team);
          heads += plan.heads.heads_in(c, group);
        }
        REQUIRE(heads == group);
      }
    }
  }
}

TEST_CASE("runs of a stream are whole tiles and fill the multiprocessors", "[window]") {
  const int32_t start[] = {0};
  for (const int32_t keys : {32, 64, 128}) {
    for (const int32_t rows : {1, 2, 3, 8, 40, 100, 132, 133, 256, 1000, 4096}) {
      for (const int32_t tokens : {1, 63, 64, 65, 1000, 4096, 32768, 33000, 131072, 1 << 20}) {
        const TokenRows dense{{}, {nullptr, nullptr, tokens}, 1};
        const int32_t run = stream_run_tokens(dense, rows, keys, 132);
        REQUIRE(run % keys == 0);
        REQUIRE(run >= keys);
        const int64_t blocks = int64_t{rows} * ceil_div(tokens, run), rounds = ceil_div<int64_t>(blocks, 132);
        // Never worse than a block a row; where rows are many, a block a row it is.
        REQUIRE(rounds * (run + kStreamStart) <=
                ceil_div<int64_t>(rows, 132) * (round_up<int64_t>(tokens, keys) + kStreamStart));
        if (rows > 8 * 132) REQUIRE(blocks == rows);
        const TokenRows arena{{start, start, int64_t{rows} * tokens, rows}, {}, 1};
        const int32_t of_arena = stream_run_tokens(arena, rows, keys, 132);
        REQUIRE(of_arena % keys == 0);
        REQUIRE(of_arena >= keys);
        REQUIRE((RowRuns{arena, rows, of_arena}.items() <= 8 * 132 + rows));
      }
    }
  }
  const TokenRows rows{{}, {nullptr, nullptr, 32768}, 8};
  REQUIRE(stream_run_tokens(rows, 8, 64, 132) == 2048);
  REQUIRE(stream_run_tokens({{}, {nullptr, nullptr, 0}, 1}, 0, 64, 132) == 64);
}
