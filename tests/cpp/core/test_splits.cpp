// SPDX-License-Identifier: Apache-2.0
// Every block of every row belongs to exactly one worker, nobody is over the quota, and a shared row's parts are found.
#include "core/splits.h"

#include <map>
#include <random>
#include <set>
#include <vector>

#include "support/catch.hpp"

using namespace uncomp;

namespace {

struct Layout {
  std::vector<int32_t> start{0}, len;
  RaggedRows rows() const { return {start.data(), len.data(), start.back(), static_cast<int32_t>(len.size())}; }
};

Layout layout(const std::vector<int32_t>& lengths, int32_t spare = 3) {
  Layout l;
  l.len = lengths;
  for (const int32_t n : lengths) l.start.push_back(l.start.back() + n + spare);
  return l;
}

/// The kernel's own search, with `helpers` threads.
RowCursor locate(const RaggedRows& rows, int32_t helpers, int64_t block, int32_t lead) {
  int64_t before = 0;
  for (int32_t t = 0; t < helpers; ++t) {
    const RowSegment segment = row_segment(rows.num_rows, t, helpers);
    const int64_t blocks = segment_blocks(rows, segment, lead);
    if (block >= before && block < before + blocks) return find_row(rows, segment, before, block, lead);
    before += blocks;
  }
  return {-1, -1};
}

/// Pieces are empty only where a row has a lead.
void check(const Layout& l, int32_t workers, int32_t lead = 0) {
  const RaggedRows rows = l.rows();
  int64_t total = 0;
  for (const int32_t n : l.len) total += split_blocks(n, lead);
  const int64_t quota = split_quota(total, workers);
  REQUIRE(quota * workers >= total);
  std::vector<int32_t> covered(l.len.size(), 0);           // slots seen so far, in order
  std::map<int32_t, std::vector<int64_t>> partials;        // row -> places, in worker order
  std::map<int32_t, std::pair<int32_t, int32_t>> claimed;  // row -> workers that its opener names
  std::set<int64_t> used;
  std::set<int32_t> seen;  // rows
  for (int32_t w = 0; w < workers; ++w) {
    const RowCursor cursor = w * quota < total ? locate(rows, 128, w * quota, lead) : RowCursor{0, 0};
    int64_t blocks = 0;
    for (SplitWalk walk(w, quota, total, cursor, lead); !walk.done();) {
      const RowPiece piece = walk.next(rows);
      REQUIRE(piece.row >= 0);
      REQUIRE(piece.row < rows.num_rows);
      REQUIRE(piece.slot_begin < piece.slot_end + (lead > 0 && piece.slot_end == 0 ? 1 : 0));
      REQUIRE(piece.slot_begin % kSplitSlots == 0);
      REQUIRE(piece.slot_begin == covered[piece.row]);
      REQUIRE(piece.starts == (seen.insert(piece.row).second));
      REQUIRE(piece.ends == (piece.slot_end == l.len[piece.row]));
      covered[piece.row] = piece.slot_end;
      blocks += split_blocks(piece.slot_end - piece.slot_begin);
      if (!(piece.starts && piece.ends)) {
        const int64_t place = partial_index(w, piece.starts);
        REQUIRE(used.insert(place).second);
        partials[piece.row].push_back(place);
      }
      if (piece.starts && !piece.ends) claimed[piece.row] = {w, static_cast<int32_t>(walk.last_block() / quota)};
    }
    REQUIRE(blocks <= quota);
  }
  REQUIRE(covered == l.len);
  REQUIRE(claimed.size() == partials.size());
  for (const auto& [row, places] : partials) {
    const auto [first, last] = claimed.at(row);
    std::vector<int64_t> expected;
    for (int32_t w = first; w <= last; ++w) expected.push_back(partial_index(w, w == first));
    REQUIRE(places == expected);
  }
}

}  // namespace

TEST_CASE("borders, skew and empty rows are covered exactly once", "[splits]") {
  const std::vector<std::vector<int32_t>> shapes = {
      {0}, {1}, {63}, {64}, {65}, {0, 0, 0}, {0, 1, 0, 64, 0}, {1000000}, {1, 1, 200000, 1, 1}, {1552, 1552, 776, 776}};
  for (const auto& lengths : shapes) {
    for (const int32_t workers : {1, 2, 7, 108, 264}) check(layout(lengths), workers);
  }
}

TEST_CASE("random rows are covered exactly once", "[splits]") {
  std::mt19937 random(7);
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<int32_t> lengths(random() % 600);
    for (int32_t& n : lengths)
      n = random() % 4 == 0 ? 0 : static_cast<int32_t>(random() % (random() % 9 == 0 ? 9000 : 200));
    check(layout(lengths, static_cast<int32_t>(random() % 3)), 1 + static_cast<int32_t>(random() % 300));
  }
}

TEST_CASE("more rows than helpers are covered exactly once", "[splits]") {
  check(layout(std::vector<int32_t>(4096, 130)), 264);
  check(layout(std::vector<int32_t>(4097, 1)), 264);
}

TEST_CASE("rows with a lead are covered exactly once", "[splits]") {
  std::mt19937 random(9);
  for (const int32_t lead : {1, 8, 40}) {
    for (const int32_t workers : {1, 7, 132, 396}) {
      for (const auto& lengths :
           {std::vector<int32_t>{0}, {1}, {65, 0, 0, 64}, {131072, 131072, 131072}, {1, 90000, 1}}) {
        check(layout(lengths), workers, lead);
      }
      std::vector<int32_t> lengths(300);
      for (int32_t& n : lengths) n = random() % 4 == 0 ? 0 : static_cast<int32_t>(random() % 3000);
      check(layout(lengths), workers, lead);
    }
  }
}

TEST_CASE("a worker that opens a row has fewer slots by the lead", "[splits]") {
  const Layout l = layout({64 * 100, 64 * 100});  // two leads of 10 in a line of 220 blocks, 55 a worker
  const RaggedRows rows = l.rows();
  std::vector<int32_t> slots(4, 0);
  for (int32_t w = 0; w < 4; ++w) {
    for (SplitWalk walk(w, 55, 220, locate(rows, 4, w * 55, 10), 10); !walk.done();) {
      const RowPiece piece = walk.next(rows);
      slots[w] += piece.slot_end - piece.slot_begin;
    }
  }
  REQUIRE(slots == std::vector<int32_t>{64 * 45, 64 * 55, 64 * 45, 64 * 55});
}

TEST_CASE("segments cover all rows without overlap", "[splits]") {
  for (const int32_t rows : {0, 1, 127, 128, 129, 5000}) {
    int32_t next = 0;
    for (int32_t part = 0; part < 128; ++part) {
      const RowSegment segment = row_segment(rows, part, 128);
      REQUIRE(segment.begin == next);
      REQUIRE(segment.end >= segment.begin);
      next = segment.end;
    }
    REQUIRE(next == rows);
  }
}
