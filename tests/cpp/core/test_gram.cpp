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

TEST_CASE("a plan fits its kernels for all sizes", "[gram]") {
  for (const int64_t matrices : {0, 1, 3, 8, 32, 1000, 100000}) {
    for (const int64_t seq_len : {0, 1, 64, 129, 4096, 131072}) {
      for (const int dim : {2, 64, 80, 128, 129, 256}) {
        const SpectrumPlan plan = spectrum_plan(matrices, seq_len, dim, 2, 132, int64_t{60} << 20);
        REQUIRE((plan.tile >= dim && plan.tile < max_of(2 * dim, 65)));
        REQUIRE((plan.group >= 1 && plan.group <= max_of<int64_t>(matrices, 1) && plan.group <= 65535));
        REQUIRE((plan.sum_chunks >= 1 && plan.sum_chunks <= 128));
        REQUIRE((plan.gram_chunks >= 1 && plan.gram_chunks <= 1024));
        REQUIRE(ceil_div<int64_t>(seq_len, plan.gram_chunks) <= 4096);
      }
    }
  }
}

TEST_CASE("heads of a group fit into L2 together and fill the device", "[gram]") {
  const SpectrumPlan calibration = spectrum_plan(32, 4096, 128, 2, 132, int64_t{60} << 20);
  REQUIRE(calibration.group == 16);
  REQUIRE(calibration.gram_chunks == 16);
  const SpectrumPlan online = spectrum_plan(32, 32768, 128, 2, 132, int64_t{60} << 20);
  REQUIRE(online.group == 3);
  REQUIRE(online.gram_chunks == 88);
  REQUIRE(spectrum_plan(1, 10, 64, 2, 132, int64_t{60} << 20).partial_words() == 4 * GramPlan<64>::kVectors);
  REQUIRE(spectrum_plan(1, 10, 128, 2, 132, int64_t{60} << 20).partial_words() == 4 * GramPlan<128>::kVectors);
  REQUIRE(spectrum_plan(1, 10, 256, 2, 132, int64_t{60} << 20).partial_words() == 4 * GramPlan<256>::kVectors);
}

TEST_CASE("blocks on the line of all heads meet every tile once, in order, and store no two pieces in one place",
          "[gram]") {
  for (const int heads : {1, 2, 7, 32, 133}) {
    for (const int head_tiles : {1, 2, 5, 128, 1000}) {
      for (const int blocks : {1, 2, 31, 132, 264}) {
        const int64_t all = int64_t{heads} * head_tiles;
        if (blocks > all) continue;
        std::set<int> places;
        int reached = 0;
        for (int b = 0; b < blocks; ++b) {
          const int end = line_begin(all, blocks, b + 1);
          REQUIRE(line_begin(all, blocks, b) == reached);
          for (int at = reached; at >= 0;) {
            const LinePiece piece = line_piece(head_tiles, at, end);
            REQUIRE(piece.matrix * head_tiles + piece.from == reached);
            REQUIRE((piece.from < piece.to && piece.to <= head_tiles));
            REQUIRE(line_owner(all, blocks, reached) == b);
            reached += piece.to - piece.from;
            REQUIRE(line_owner(all, blocks, reached - 1) == b);
            REQUIRE(piece.whole == (piece.from == 0 && piece.to == head_tiles));
            const bool alone = line_owner(all, blocks, int64_t{piece.matrix} * head_tiles) ==
                               line_owner(all, blocks, int64_t{piece.matrix + 1} * head_tiles - 1);
            REQUIRE(piece.whole == alone);
            if (!piece.whole) REQUIRE(places.insert(b + piece.matrix).second);
            REQUIRE(b + piece.matrix < blocks + heads);
            at = piece.next;
          }
          REQUIRE(reached == end);
        }
        REQUIRE(reached == all);
      }
    }
  }
  for (const int count : {0, 1, 31, 4096, 2147483647}) {
    REQUIRE(line_token(count, 0, 128) == 0);
    REQUIRE(line_token(count, 128, 128) == count);
  }
}

TEST_CASE("blocks of the one launch fill the device, and an accumulator stays short", "[gram]") {
  const auto plan = [](int64_t matrices, int64_t seq_len, int dim) {
    return stream_plan(spectrum_plan(matrices, seq_len, dim, 2, 132, int64_t{60} << 20), matrices, seq_len, 132);
  };
  REQUIRE(plan(32, 4096, 128).stream_blocks == 128);  // four a head
  REQUIRE(plan(8, 32768, 128).stream_blocks == 128);
  REQUIRE(plan(32, 32768, 128).stream_blocks == 132);
  REQUIRE(plan(40, 4096, 128).stream_blocks == 132);  // three a head would leave too many idle
  REQUIRE(plan(32, 32768, 128).partial_words() == (132 + 32) * 36 * 256 / 3 * 4);
  REQUIRE(plan(256, 129, 128).stream_blocks == 256);  // a block a head
  REQUIRE(plan(0, 129, 128).stream_blocks == 0);
  REQUIRE(plan(100000, 129, 128).stream_blocks == 0);
  for (const int64_t matrices : {1, 3, 8, 133, 5000}) {
    for (const int64_t seq_len : {0, 1, 129, 4096, 131072, 1000000}) {
      for (const int dim : {8, 64, 128}) {
        const SpectrumPlan p = plan(matrices, seq_len, dim);
        if (p.stream_blocks == 0) continue;
        REQUIRE(int64_t{p.stream_blocks} <= matrices * p.head_tiles);
        REQUIRE(matrices * seq_len / p.stream_blocks <= 8192);
        REQUIRE((p.sum_chunks >= 1 && p.sum_chunks <= 128 && p.group == matrices));
      }
    }
  }
}

TEST_CASE("heads of few tokens lie in one tile, without partial results", "[gram]") {
  const auto plan = [](int64_t seq_len, int dim) {
    return small_plan(spectrum_plan(32, seq_len, dim, 2, 132, int64_t{60} << 20), seq_len);
  };
  for (const int seq_len : {0, 1, 16, 17, 129, 256}) {
    const SpectrumPlan p = plan(seq_len, 128);
    REQUIRE((p.tile_tokens >= seq_len && p.tile_tokens >= 16 && p.tile_tokens % 16 == 0));
    REQUIRE(p.tile_tokens < seq_len + 16 + (seq_len == 0 ? 1 : 0));
    REQUIRE((p.sum_words() == 0 && p.partial_words() == 0));
  }
  REQUIRE(plan(257, 128).tile_tokens == 0);
  REQUIRE(plan(129, 129).tile_tokens == 0);
}
