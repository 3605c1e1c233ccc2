// SPDX-License-Identifier: Apache-2.0
// Who computes what in a Gram matrix: the split of the tokens over blocks, and of the lower triangle over warps.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace uncomp {

struct TokenRange {
  int32_t begin, end;
};

/// Chunk `c` of `count` tokens cut into `chunks` ranges of equal length, a multiple of `multiple`; late ranges may be
/// empty.
UNCOMP_HD constexpr TokenRange chunk_range(int32_t count, int32_t chunks, int32_t multiple, int32_t c) {
  const int64_t length = round_up<int64_t>(ceil_div<int64_t>(count, chunks), multiple);
  const int64_t begin = min_of<int64_t>(length * c, count), end = min_of<int64_t>(begin + length, count);
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

/// The lower triangle of a kTile x kTile matrix in blocks of 16 x 16. Block rows p and kSide - 1 - p hold kSide + 1
/// blocks together; two warps share them, so every warp has kSlots blocks or one less, and loads at most kSlots + 1
/// operand fragments for them.
template <int kTile>
struct GramPlan {
  static constexpr int kSide = kTile / 16;  // blocks a side, and warps
  static constexpr int kWarps = kSide;
  static constexpr int kSlots = kSide / 2 + 1;  // blocks of an even warp
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kVectors = kSlots * 2 * kThreads;  // float4 of one stored partial matrix

  UNCOMP_HD static constexpr int long_row(int warp) { return kSide - 1 - warp / 2; }
  UNCOMP_HD static constexpr int short_row(int warp) { return warp / 2; }
  /// Slots below `split` lie in the long row, the others in the short one. Even warps stay in the long row.
  UNCOMP_HD static constexpr int split(int warp) { return warp % 2 == 0 ? kSlots : kSlots - 2 - warp / 2; }
  UNCOMP_HD static constexpr int slots(int warp) { return warp % 2 == 0 ? kSlots : kSlots - 1; }
  UNCOMP_HD static constexpr int block_row(int warp, int slot) {
    return slot < split(warp) ? long_row(warp) : short_row(warp);
  }
  UNCOMP_HD static constexpr int block_column(int warp, int slot) {
    if (warp % 2 == 0) return slot;
    return slot < split(warp) ? kSlots + slot : slot - split(warp);
  }
};

}  // namespace uncomp
