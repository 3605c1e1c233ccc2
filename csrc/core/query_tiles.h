// SPDX-License-Identifier: Apache-2.0
// Which keys a tile of new queries sees. The g heads of a row's new tokens are packed: packed query m = token * g +
// head. A tile of packed queries sees the past slots of its row, then the new tokens up to its last one, in tiles of
// kKeyTile keys; the past comes first and needs a mask only in its last tile, the new tokens need one at the diagonal.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace uncomp {

inline constexpr int32_t kQueryTile = 64;  // packed queries
inline constexpr int32_t kKeyTile = 64;    // keys

/// Up to kKeyTile neighbouring keys of the past (slots of the row) or of the new tokens (counted from the first valid).
struct KeyTile {
  bool is_new;
  int32_t begin, live;  // first key, keys that exist; at least one
};

struct QueryTilePlan {
  int32_t past_len;    // live slots of the row
  int32_t new_len;     // new keys that the last valid token of the tile sees; 0 without new keys
  int32_t past_tiles;  // tiles before the first one of new keys
  int32_t tiles;       // all; 0 when the tile has no valid token

  UNCOMP_HD constexpr KeyTile at(int32_t tile) const {
    const bool is_new = tile >= past_tiles;
    const int32_t begin = (is_new ? tile - past_tiles : tile) * kKeyTile;
    return {is_new, begin, min_of((is_new ? new_len : past_len) - begin, kKeyTile)};
  }
};

/// Plan of the packed queries m_begin .. m_begin + kQueryTile - 1. Tokens first .. first + count - 1 of `seq_len` are
/// valid.
UNCOMP_HD constexpr QueryTilePlan plan_query_tile(int32_t m_begin, int32_t group_size, int32_t seq_len, int32_t first,
                                                  int32_t count, int32_t past_len, bool has_new) {
  const int32_t low = max_of(m_begin / group_size, first);
  const int32_t high = min_of(
      min_of(static_cast<int32_t>((int64_t{m_begin} + kQueryTile - 1) / group_size), seq_len - 1), first + count - 1);
  if (low > high) return {past_len, 0, 0, 0};
  const int32_t new_len = has_new ? high - first + 1 : 0;
  const int32_t past_tiles = ceil_div<int64_t>(past_len, kKeyTile);
  return {past_len, new_len, past_tiles, past_tiles + static_cast<int32_t>(ceil_div<int64_t>(new_len, kKeyTile))};
}

/// Keys at the start of `tile` that valid token `token` sees, 0 to kKeyTile.
UNCOMP_HD constexpr int32_t visible_keys(const KeyTile& tile, int32_t token, int32_t first) {
  return tile.is_new ? clamp(token - first + 1 - tile.begin, 0, tile.live) : tile.live;
}

/// First tile of part `part` out of `parts`; part `parts` gives the end.
UNCOMP_HD constexpr int32_t part_begin(int32_t tiles, int32_t part, int32_t parts) {
  return static_cast<int32_t>(int64_t{tiles} * part / parts);
}

}  // namespace uncomp
