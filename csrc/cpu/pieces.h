// SPDX-License-Identifier: Apache-2.0
// How rows are cut into pieces that threads share. A cut depends on the row's length alone, never on the number of
// threads, so that results do not either.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace uncomp::cpu {

/// Tokens first .. end - 1 of a row.
struct Piece {
  int32_t row;
  int32_t first, end;
};

/// Tokens of a piece: about 32 pieces a row. More than four heads pass over a piece again, which then stays in cache.
constexpr int32_t piece_tokens(int32_t len, int32_t group_size) {
  const int32_t even = round_up(len / 32 + 1, 64);
  return group_size > 4 ? 256 : clamp(even, 256, 1024);
}

/// Tokens of a piece whose keys are made again: they stay in the second-level cache.
inline constexpr int32_t kMadeTokens = 256;

/// Pieces of a row; an empty row has one of no token.
constexpr int32_t num_pieces(int32_t len, int32_t tokens) { return max_of(len / tokens + (len % tokens != 0), 1); }

}  // namespace uncomp::cpu
