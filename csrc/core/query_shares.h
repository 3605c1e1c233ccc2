// SPDX-License-Identifier: Apache-2.0
// Equal shares of attention work. The work is cut into units, a tile of packed queries against a tile of keys, in the
// order of rows, query tiles and keys; a worker gets a run of neighbouring units. So a share ends inside a query tile
// at most twice, and the parts of a tile belong to neighbouring workers, in the order of its keys.
#pragma once

#include <cstdint>

#include "core/query_tiles.h"

namespace uncomp {

/// Division by a number that is the same all through a kernel, as one multiplication: exact for 0 <= n < 2^31.
struct Divisor {
  uint32_t factor;
  int32_t shift;

  UNCOMP_HD constexpr int32_t divide(int32_t n) const {
    return static_cast<int32_t>((uint64_t{factor} * static_cast<uint32_t>(n)) >> shift);
  }
};

/// 1 <= by < 2^31. The factor is 2^(31 + s) / by, rounded up, with 2^s >= by: the error of less than n / 2^31 stays
/// below the distance 1 / by of a quotient from the next integer.
constexpr Divisor divisor(int32_t by) {
  int32_t s = 0;
  while ((int64_t{1} << s) < by) ++s;
  return {static_cast<uint32_t>(ceil_div<uint64_t>(uint64_t{1} << (31 + s), static_cast<uint64_t>(by))), 31 + s};
}

/// Keys that a query tile sees: past slots first, then the new tokens up to its last valid one.
struct QueryTileKeys {
  int32_t past_len;    // live slots of the row
  int32_t new_len;     // new keys, counted from the first valid token
  int32_t past_tiles;  // key tiles before the first one of new keys
  int32_t tiles;       // all; 0 when the tile has no valid token or nothing to see

  UNCOMP_HD constexpr KeyTile at(int32_t tile, int32_t keys) const {
    const bool is_new = tile >= past_tiles;
    const int32_t begin = (is_new ? tile - past_tiles : tile) * keys;
    return {is_new, begin, min_of((is_new ? new_len : past_len) - begin, keys)};
  }
  /// A tile without keys is work too: its results are written.
  UNCOMP_HD constexpr int32_t units() const { return max_of(tiles, 1); }
};

/// Keys of a tile whose packed queries belong to tokens low .. high (beyond the last one of `seq_len` where the tile is
/// not full). Tokens first .. first + count - 1 are valid; key tiles have `keys` keys.
UNCOMP_HD constexpr QueryTileKeys query_tile_keys(int32_t keys, int32_t low, int32_t high, int32_t first, int32_t count,
                                                  int32_t past_len, bool has_new) {
  low = max_of(low, first);
  high = min_of(high, first + count - 1);
  if (low > high) return {past_len, 0, 0, 0};
  const int32_t new_len = has_new ? high - first + 1 : 0;
  const int32_t past_tiles = static_cast<int32_t>(ceil_div<int64_t>(past_len, keys));
  return {past_len, new_len, past_tiles, past_tiles + static_cast<int32_t>(ceil_div<int64_t>(new_len, keys))};
}

/// Units of a share when `units` are dealt to `workers`; the last shares are shorter or empty.
UNCOMP_HD constexpr int64_t share_units(int64_t units, int32_t workers) {
  return max_of<int64_t>(ceil_div<int64_t>(units, workers), 1);
}

/// What a worker does of one query tile: units begin .. end - 1 of `units`.
struct TilePart {
  int32_t begin, end, units;

  UNCOMP_HD constexpr bool whole() const { return begin == 0 && end == units; }
  /// A worker has at most one part that another worker began and one that another worker goes on with.
  UNCOMP_HD constexpr int32_t place(int32_t worker) const { return 2 * worker + (begin == 0 ? 1 : 0); }
};

/// The next part of a share with `left` units that has done `done` units of a tile.
UNCOMP_HD constexpr TilePart next_part(int32_t units, int32_t done, int64_t left) {
  return {done, static_cast<int32_t>(min_of<int64_t>(units, done + left)), units};
}

}  // namespace uncomp
