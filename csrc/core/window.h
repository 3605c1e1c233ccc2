// SPDX-License-Identifier: Apache-2.0
// Scheduling and indexing of the kernels that multiply the last queries of a prompt with all keys: where a row's
// tokens lie, how rows are cut into runs for blocks, how queries are packed into matrix tiles, what a query sees.
#pragma once

#include <cstdint>

#include "core/constants.h"
#include "core/math.h"
#include "core/ragged.h"

namespace uncomp {

inline constexpr int kWindowWarps = 4;
inline constexpr int kWindowThreads = 32 * kWindowWarps;
/// Queries of a matrix tile's narrow side: a packed head starts on a multiple of this.
inline constexpr int kQueryTile = 8;

/// Queries that one block keeps in shared memory: 32 KiB of them at most.
UNCOMP_HD constexpr int32_t max_block_queries(int32_t head_dim_tile) { return head_dim_tile == 256 ? 64 : 128; }
/// Keys that a warp keeps in registers, 32-bit registers a lane: 64 at most.
UNCOMP_HD constexpr int32_t warp_keys(int32_t head_dim_tile) { return head_dim_tile == 256 ? 16 : 32; }

/// Place of a 16-byte piece inside its shared-memory row: eight rows of one column meet eight different banks groups.
UNCOMP_HD constexpr int32_t swizzled(int32_t row, int32_t piece) { return piece ^ (row & 7); }

/// Tokens of rows, one row per (sequence, KV head): a dense [B, H, S, D] tensor, or an arena where row_start is set.
struct TokenRows {
  RaggedRows arena;
  ValidTokens dense;
  int32_t rows_per_sequence;

  UNCOMP_HD bool in_arena() const { return arena.row_start != nullptr; }
  UNCOMP_HD int32_t count(int32_t row) const {
    return in_arena() ? arena.len(row) : dense.count(row / rows_per_sequence);
  }
  /// Elements from the tensor's start to the row's token 0. An arena uses stride.token alone.
  UNCOMP_HD int64_t offset(int32_t row, const Strides3& stride) const {
    if (in_arena()) return arena.start(row) * stride.token;
    const int32_t sequence = row / rows_per_sequence;
    return sequence * stride.batch + (row % rows_per_sequence) * stride.head + dense.begin(sequence) * stride.token;
  }
};

/// A run: tokens first .. first + run - 1 of a row, the work of one block. row -1: nothing to do.
struct RowRun {
  int32_t row;
  int32_t first;  // tokens
};

/// All runs of all rows, numbered without knowing a length on the host. Dense rows get ceil(S / run) numbers each.
/// Row r of an arena gets the numbers from floor(row_start[r] / run) + r on, which always suffice for its room, so a
/// flat grid of `items` blocks serves rows however skewed.
struct RowRuns {
  TokenRows rows;
  int32_t num_rows;
  int32_t run;  // tokens

  UNCOMP_HD int64_t first_item(int32_t row) const {
    if (!rows.in_arena()) return static_cast<int64_t>(row) * ceil_div(rows.dense.seq_len, run);
    return rows.arena.start(row) / run + row;
  }
  /// Host: an upper bound of all numbers.
  int64_t items() const {
    if (!rows.in_arena()) return first_item(num_rows);
    return num_rows == 0 ? 0 : rows.arena.capacity / run + num_rows;
  }
  UNCOMP_HD RowRun at(int64_t item) const {
    int32_t low = 0;
    if (!rows.in_arena()) {
      low = static_cast<int32_t>(item / ceil_div(rows.dense.seq_len, run));
    } else {
      // The last row that starts at or before the item.
      int32_t high = num_rows;
      while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        if (first_item(middle) <= item) {
          low = middle;
        } else {
          high = middle;
        }
      }
    }
    const int64_t first = (item - first_item(low)) * run;
    if (first < 0 || first >= (int64_t{1} << 30)) return {-1, 0};
    return {low, static_cast<int32_t>(first)};
  }
};

/// Tokens of a run: whole rounds of all warps of a block, as many as still leave `blocks_wanted` blocks, at most 16.
constexpr int32_t run_tokens(int64_t tokens, int32_t head_dim_tile, int64_t blocks_wanted) {
  const int32_t round = kWindowWarps * warp_keys(head_dim_tile);
  const int64_t rounds = clamp<int64_t>(tokens / (round * max_of<int64_t>(blocks_wanted, 1)), 1, 16);
  return round * static_cast<int32_t>(rounds);
}

/// Newest key that query i of a window sees in a row of n tokens; negative: the query does not exist.
UNCOMP_HD constexpr int32_t newest_visible(int32_t tokens, int32_t window, int32_t i) { return tokens - window + i; }

/// Queries of a row packed in tiles of 8 so that a tile holds one head: what a sum over the window needs. Tile t of
/// a chunk is queries 8 * (t % tiles_per_head) and on of head t / tiles_per_head.
struct HeadTiles {
  int32_t tiles_per_head;
  int32_t heads_per_chunk;
  int32_t chunks;

  UNCOMP_HD static constexpr HeadTiles of(int32_t group, int32_t window, int32_t max_queries) {
    const int32_t tiles = ceil_div<int32_t>(window, kQueryTile);
    const int32_t heads = min_of<int32_t>(group, max_queries / (tiles * kQueryTile));
    return {tiles, heads, ceil_div(group, heads)};
  }
  UNCOMP_HD constexpr int32_t heads_in(int32_t chunk, int32_t group) const {
    return min_of<int32_t>(heads_per_chunk, group - chunk * heads_per_chunk);
  }
};

/// Queries packed so that tile t of a chunk is query tile t / group of head t % group: what a vote, a reduction over
/// the heads of one query, needs. A chunk is `query_tiles` tiles of every head.
struct VoteTiles {
  int32_t query_tiles;  // of one chunk
  int32_t chunks;
  int32_t total;  // query tiles

  UNCOMP_HD static constexpr VoteTiles of(int32_t group, int32_t vote_window) {
    const int32_t total = ceil_div<int32_t>(vote_window, kQueryTile);
    const int32_t at_once = clamp<int32_t>(128 / (group * kQueryTile), 1, total);
    return {at_once, ceil_div(total, at_once), total};
  }
  UNCOMP_HD constexpr int32_t tiles_in(int32_t chunk) const {
    return min_of<int32_t>(query_tiles, total - chunk * query_tiles);
  }
};

}  // namespace uncomp
