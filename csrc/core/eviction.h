// SPDX-License-Identifier: Apache-2.0
// The rule of one decode step on one row: what the step does, who may leave, who leaves first, and how a row is cut
// into slices. One text for the CPU body, the kernels and the tests.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace uncomp {

/// Ring row that a step replaces: the oldest. Any int32 is a valid counter; the next one is ring row + 1.
UNCOMP_HD constexpr int32_t vote_ring_row(int32_t step, int32_t vote_window) {
  const int32_t row = step % vote_window;
  return row < 0 ? row + vote_window : row;
}

/// What a step does with a row of `len` stored tokens. Places count the stored tokens in position order; the new token
/// stands behind them, at place `len`.
struct EvictStep {
  enum class Kind : int32_t { nothing, append, evict };

  Kind kind;
  int32_t len;         // K, stored tokens
  int32_t candidates;  // places 0 .. candidates - 1 are pooled
  int32_t first;       // places first .. candidates - 1 may leave; never empty where kind is evict

  /// Place after the last neighbour of `place`, and its first neighbour, for a pool of 2 * half + 1 places.
  UNCOMP_HD constexpr int32_t pool_begin(int32_t place, int32_t half) const { return max_of(place - half, 0); }
  UNCOMP_HD constexpr int32_t pool_end(int32_t place, int32_t half) const {
    return place + 1 + min_of(half, candidates - 1 - place);
  }
};

/// The newest `window` >= 1 tokens (the new one among them) and the first `sink` stay. Where the room is too small for
/// both, the oldest token that is no sink leaves, or the oldest of all.
UNCOMP_HD constexpr EvictStep evict_step(int32_t len, int32_t room, int32_t window, int32_t sink) {
  if (room <= 0) return {EvictStep::Kind::nothing, 0, 0, 0};
  len = clamp<int32_t>(len, 0, room);
  if (len < room) return {EvictStep::Kind::append, len, 0, 0};
  const int32_t candidates = clamp<int32_t>(len - (window - 1), 0, len);
  if (sink < candidates) return {EvictStep::Kind::evict, len, candidates, sink};
  const int32_t oldest = sink < len ? sink : 0;
  return {EvictStep::Kind::evict, len, oldest + 1, oldest};
}

/// A token that may leave. Scores are integers: pooled vote sums (max), or the plain sum over the pool (avg, whose
/// divisor is the same for all).
struct Leaver {
  int64_t score;
  int32_t place;
};

/// Leaves after everybody else.
inline constexpr Leaver kNobody{INT64_MAX, INT32_MAX};

/// The smallest score leaves, among equals the oldest.
UNCOMP_HD constexpr bool leaves_before(const Leaver& a, const Leaver& b) {
  return a.score < b.score || (a.score == b.score && a.place < b.place);
}

/// Place whose entry stands at `place` once the entry at `removed` is gone.
UNCOMP_HD constexpr int32_t order_source(int32_t place, int32_t removed) { return place + (place >= removed ? 1 : 0); }

/// A row cut for several blocks: slices of whole tiles, all but the last of equal size, at most `most` of them.
struct RowSlices {
  int32_t tiles;        // of the row
  int32_t slice_tiles;  // of a slice
  int32_t count;        // slices that hold tiles; 0 for an empty row

  UNCOMP_HD constexpr int32_t begin(int32_t slice) const {
    return static_cast<int32_t>(min_of<int64_t>(static_cast<int64_t>(slice) * slice_tiles, tiles));
  }
  UNCOMP_HD constexpr int32_t end(int32_t slice) const { return begin(slice + 1); }
};

UNCOMP_HD constexpr RowSlices row_slices(int32_t len, int32_t most, int32_t tile, int32_t least_tiles) {
  const int32_t tiles = len / tile + (len % tile != 0 ? 1 : 0);
  const int32_t slice_tiles = max_of(tiles / most + (tiles % most != 0 ? 1 : 0), least_tiles);
  return {tiles, slice_tiles, ceil_div(tiles, slice_tiles)};
}

/// How a step is cut when one cluster of blocks does a row in one launch: rank c takes the c-th slice of the slots, and
/// the same slice of the places. A function of sizes that the host knows, like EvictPlan.
struct RankPlan {
  int32_t ranks;        // blocks of a cluster
  int32_t rank_bits;    // ranks = 1 << rank_bits
  int32_t held;         // slots of a rank whose logits stay on chip
  int32_t share;        // channels of the output of a rank, over all heads
  int32_t first_round;  // blocks of the first of several rounds; 0: there is one
  int32_t late_clocks;  // by which every second block of that round starts late
};

/// Clocks that a multiprocessor's part of the memory rate needs for `slots` slots. With several rounds of blocks, the
/// second block of each multiprocessor starts so much later: else all would stream, and then vote, at the same time,
/// round after round.
UNCOMP_HD constexpr int32_t late_clocks(int64_t slots, int32_t slot_bytes) {
  constexpr int64_t kBytesPerClock = 20, kMost = 1 << 20;
  return static_cast<int32_t>(min_of(slots * slot_bytes / kBytesPerClock, kMost));
}

inline constexpr int32_t kMostRanks = 16;
/// Slots of a slice are a multiple of this: what a warp takes at a time.
inline constexpr int32_t kRankTile = 16;

/// Enough ranks to fill `blocks_in_flight` places, and then as many more as keep rows of 5/3 of the mean on chip, the
/// longest of linear budgets over eight groups, if that is possible at all. `held` slots of a rank fit on chip.
UNCOMP_HD constexpr int32_t rank_count(int32_t num_rows, int64_t capacity, int32_t blocks_in_flight, int32_t held,
                                       int32_t most_ranks) {
  if (num_rows <= 0) return 1;
  int32_t ranks = 1;
  while (ranks < most_ranks && int64_t{2} * ranks * num_rows <= blocks_in_flight) ranks *= 2;
  const int64_t mean = ceil_div<int64_t>(capacity, num_rows), wanted = mean + mean * 2 / 3;
  for (int32_t more = ranks; more <= most_ranks; more *= 2) {
    if (wanted <= static_cast<int64_t>(more) * held) return more;
  }
  return ranks;
}

/// Whether one launch does the step sooner than several: rows of mean length fit on chip, and there are enough of them
/// to keep half the device busy, or they are short.
UNCOMP_HD constexpr bool row_launch_pays(int32_t num_rows, int64_t capacity, int32_t sm_count, const RankPlan& plan) {
  constexpr int64_t kShortRow = 4096;
  const int64_t mean = ceil_div<int64_t>(capacity, max_of(num_rows, 1));
  const bool fills = int64_t{2} * num_rows * plan.ranks >= sm_count || mean <= kShortRow;
  return fills && mean <= static_cast<int64_t>(plan.ranks) * plan.held;
}

/// Slots of a rank's slice of a row of `len` tokens, at most INT32_MAX - kRankTile; the last slices may be shorter, or
/// empty.
UNCOMP_HD constexpr int32_t rank_slice(int32_t len, int32_t rank_bits) {
  const int64_t step = int64_t{kRankTile} << rank_bits;
  return static_cast<int32_t>(((len + step - 1) >> rank_bits) / kRankTile * kRankTile);
}

/// i / divisor, given 1.0f / divisor, for divisors up to 2^15 and quotients up to 16: half a step of distance to the
/// next whole number is more than all roundings.
UNCOMP_HD constexpr int32_t small_quotient(int32_t i, float inverse) {
  return static_cast<int32_t>((static_cast<float>(i) + 0.5f) * inverse);
}

/// How the launches of a step are cut. A function of sizes that the host knows, so that a captured graph and an eager
/// step do the same whatever the lengths are.
struct EvictPlan {
  int32_t most_slices;  // P, blocks that share the attention of a row, at most
  int32_t least_tiles;  // of a slice: an even share of the whole arena
  int32_t vote_slices;  // blocks that share the votes of a row; 1: the block that evicts does them
};

inline constexpr int32_t kMostSlices = 128;
/// Slots of one tile: what a block of four warps takes at a time.
inline constexpr int32_t kEvictTile = 64;

/// `blocks_in_flight` blocks fill the device. A row may be cut four times finer than an even share of rows asks for,
/// so that a row much longer than the others does not wait for few blocks.
UNCOMP_HD constexpr EvictPlan evict_plan(int32_t num_rows, int64_t capacity, int32_t blocks_in_flight) {
  if (num_rows <= 0) return {1, 1, 1};
  const int64_t mean = capacity / num_rows, most = int64_t{4} * blocks_in_flight / num_rows;
  const int64_t tiles = ceil_div<int64_t>(capacity, kEvictTile);
  // Votes of a short row are done sooner than another launch begins.
  const int64_t vote_slices = mean <= 8192 ? 1 : clamp<int64_t>(mean / 4096, 1, blocks_in_flight / num_rows);
  return {static_cast<int32_t>(clamp<int64_t>(most, 1, kMostSlices)),
          static_cast<int32_t>(max_of<int64_t>(ceil_div<int64_t>(tiles, blocks_in_flight), 1)),
          static_cast<int32_t>(clamp<int64_t>(vote_slices, 1, kMostSlices))};
}

/// The slices into which the attention of a row of `len` tokens is cut.
UNCOMP_HD constexpr RowSlices attend_slices(int32_t len, const EvictPlan& plan) {
  return row_slices(len, plan.most_slices, kEvictTile, plan.least_tiles);
}

}  // namespace uncomp
