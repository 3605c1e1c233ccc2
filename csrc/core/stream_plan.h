// SPDX-License-Identifier: Apache-2.0
// Scheduling of the streaming kernels of window_scores: how the packed queries of a row are spread over warpgroups,
// and how long the runs of keys are.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "core/window.h"

namespace uncomp {

/// What a block costs before its first key and after its last one, in keys.
inline constexpr int32_t kStreamStart = 256;

/// Warpgroups of a block that multiply, 64 queries each.
UNCOMP_HD constexpr int32_t stream_groups(int32_t head_dim_tile) { return head_dim_tile == 256 ? 3 : 4; }
/// Keys of one tile.
UNCOMP_HD constexpr int32_t stream_keys(int32_t head_dim_tile) {
  return head_dim_tile == 256 ? 32 : head_dim_tile == 128 ? 128 : 64;
}

struct StreamPlan {
  HeadTiles heads;
  int32_t team;   // warpgroups that share a tile
  int32_t teams;  // tiles in work at once
  int32_t runs;   // of a dense row; 0 in an arena

  UNCOMP_HD static constexpr StreamPlan of(int32_t group, int32_t window, int32_t groups) {
    const HeadTiles heads = HeadTiles::of(group, window, 64 * groups);
    const int32_t team = ceil_div(heads.heads_per_chunk * heads.tiles_per_head * kQueryTile, 64);
    return {heads, team, groups / team, 0};
  }
  /// Head of a chunk that owns tile `tile` of 8 packed queries: tile / tiles_per_head for up to 32 tiles.
  UNCOMP_HD constexpr int32_t head_of(int32_t tile) const {
    return tile * ((256 + heads.tiles_per_head - 1) / heads.tiles_per_head) >> 8;
  }
  /// Where sums of tiles wait, 8 or 16 queries a line: places are a power of two, at least as many as teams, so that a
  /// team that comes back to a place meets the next phase of its barriers and no later one.
  UNCOMP_HD constexpr int32_t log_places(bool by_8) const {
    return (teams > 2 ? 2 : teams > 1 ? 1 : 0) + (by_8 ? 0 : 1);
  }
  /// At most 32 lines in all places together.
  UNCOMP_HD constexpr int32_t lines_of_place(bool by_8) const { return team * (by_8 ? 8 : 4); }
  /// Packed rows of a chunk.
  UNCOMP_HD constexpr int32_t rows_in(int32_t chunk, int32_t group) const {
    return heads.heads_in(chunk, group) * heads.tiles_per_head * kQueryTile;
  }
};

/// Tokens of a run, one run a block, one block a multiprocessor at once: as few rounds of blocks as leave none of them
/// mostly idle. An arena has a run more for each row.
constexpr int32_t stream_run_tokens(const TokenRows& rows, int32_t num_rows, int32_t keys, int32_t multiprocessors) {
  const int64_t most = int64_t{1} << 29;
  int64_t best = 0, best_cost = 0;
  for (int64_t rounds = 1; rounds <= 8; ++rounds) {
    const int64_t blocks = rounds * multiprocessors;
    int64_t run = 0;
    if (rows.in_arena()) {
      if (blocks <= num_rows) continue;
      run = ceil_div<int64_t>(rows.arena.capacity, blocks - num_rows);
    } else {
      if (blocks < num_rows) continue;
      run = ceil_div<int64_t>(rows.dense.seq_len, blocks / max_of(num_rows, 1));
    }
    run = clamp<int64_t>(round_up<int64_t>(run, keys), keys, most);
    const int64_t cost = rounds * (run + kStreamStart);
    if (best == 0 || cost < best_cost) {
      best = run;
      best_cost = cost;
    }
  }
  if (best != 0) return static_cast<int32_t>(best);
  const int64_t longest = rows.in_arena() ? rows.arena.capacity / (8 * multiprocessors) : rows.dense.seq_len;
  return static_cast<int32_t>(clamp<int64_t>(round_up<int64_t>(longest, keys), keys, most));
}

}  // namespace uncomp
