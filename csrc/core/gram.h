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

/// How the launches of one matrix_spectrum call are cut.
struct SpectrumPlan {
  int32_t tile;           // channels after zero fill: 64, 128 or 256
  int32_t group;          // heads between whose two readings nothing else is read, so that the second hits L2
  int32_t sum_chunks;     // token ranges of a head in the column sums
  int32_t gram_chunks;    // token ranges of a head in the Gram matrix
  int32_t stream_blocks;  // blocks that share the tokens of all heads on sm_90; 0: not so
  int32_t head_tiles;     // pieces of a head in which they share
  int32_t tile_tokens;    // tokens of a tile that holds a whole head; 0: not so

  /// float32 words of the three workspace parts.
  constexpr int64_t sum_words() const {
    if (tile_tokens > 0) return 0;
    return int64_t{group} * sum_chunks * tile;
  }
  constexpr int64_t partial_words() const {
    if (tile_tokens > 0) return 0;
    if (stream_blocks > 0) return (stream_blocks + group) * (tile == 64 ? 4096 : 12288);
    return int64_t{group} * gram_chunks * (tile / 32 + 1) * 16 * tile;
  }
  constexpr int64_t gram_words(int64_t matrices) const { return matrices * tile * tile; }
};

/// `l2_bytes` and `sm_count` describe the device; `matrices` and `seq_len` may be 0.
constexpr SpectrumPlan spectrum_plan(int64_t matrices, int64_t seq_len, int32_t dim, int32_t element_bytes,
                                     int32_t sm_count, int64_t l2_bytes) {
  constexpr int64_t kMostSums = 128;       // summed again by every block of the Gram kernel
  constexpr int64_t kLongestChunk = 4096;  // tokens in one float32 accumulator
  constexpr int64_t kMostHeads = 32768;    // a grid's y dimension
  SpectrumPlan plan{};
  plan.tile = dim <= 64 ? 64 : (dim <= 128 ? 128 : 256);
  const int64_t head_bytes = max_of<int64_t>(seq_len * dim * element_bytes, 1);
  // Data may lie in both halves of a divided L2, so less than half of it counts.
  const int64_t in_l2 = max_of<int64_t>(l2_bytes * 21 / 50 / head_bytes, 1);
  const int64_t most = max_of<int64_t>(min_of(min_of(in_l2, matrices), kMostHeads), 1);
  const int64_t groups = max_of<int64_t>(ceil_div(matrices, most), 1);
  plan.group = static_cast<int32_t>(max_of<int64_t>(ceil_div(matrices, groups), 1));
  const int64_t blocks_per_sm = 256 / plan.tile;
  plan.sum_chunks = static_cast<int32_t>(clamp<int64_t>(ceil_div<int64_t>(4 * sm_count, plan.group), 1,
                                                        clamp<int64_t>(ceil_div<int64_t>(seq_len, 64), 1, kMostSums)));
  const int64_t wanted = max_of<int64_t>(sm_count * blocks_per_sm / plan.group, ceil_div(seq_len, kLongestChunk));
  plan.gram_chunks =
      static_cast<int32_t>(clamp<int64_t>(wanted, 1, max_of<int64_t>(ceil_div<int64_t>(seq_len, 128), 1)));
  return plan;
}

/// All heads on one line, `head_tiles` tiles each, which `blocks` blocks share equally: where a block starts.
UNCOMP_HD constexpr int32_t line_begin(int64_t all, int64_t blocks, int64_t block) {
  return static_cast<int32_t>(all * block / blocks);
}

/// The block that owns a tile of the line.
UNCOMP_HD constexpr int32_t line_owner(int64_t all, int64_t blocks, int64_t tile) {
  return static_cast<int32_t>(((tile + 1) * blocks - 1) / all);
}

/// A block's piece of a head. Pieces that are not whole are stored at number block + matrix, which no two share.
struct LinePiece {
  int32_t matrix;
  int32_t from, to;  // tiles of the head
  int32_t next;      // where the block's next piece starts, or -1
  bool whole;        // nobody else has a piece of this head
};

/// The piece that starts at `at`, of a block that ends at `end`.
UNCOMP_HD constexpr LinePiece line_piece(int32_t head_tiles, int32_t at, int32_t end) {
  LinePiece piece{};
  piece.matrix = at / head_tiles;
  piece.from = at - piece.matrix * head_tiles;
  piece.to = min_of(head_tiles, piece.from + (end - at));
  piece.next = at + (piece.to - piece.from);
  if (piece.next >= end) piece.next = -1;
  piece.whole = piece.to - piece.from == head_tiles;
  return piece;
}

/// First token of tile `tile` of a head with `count` tokens: shorter heads have shorter tiles, so blocks stay equal.
UNCOMP_HD constexpr int32_t line_token(int32_t count, int32_t tile, int32_t head_tiles) {
  return static_cast<int32_t>(int64_t{count} * tile / head_tiles);
}

/// The plan for one launch over the tokens of all heads, on a device that can run it and for states of at most 128
/// channels; unchanged where there are too many heads or tokens for it. A block adds in two float32 accumulators.
constexpr SpectrumPlan stream_plan(SpectrumPlan plan, int64_t matrices, int64_t seq_len, int32_t sm_count) {
  constexpr int64_t kLongestShare = 2 * 4096;  // tokens
  constexpr int64_t kLeastTiles = 8;           // of a block
  constexpr int64_t kShortShare = 64;          // tiles
  constexpr int64_t kPieceTiles = 16;          // as long as these takes another piece of a head
  constexpr int64_t kMostHeads = 32768, kMostSums = 128;
  const int64_t tokens = plan.tile == 64 ? 64 : 32;
  const int64_t head_tiles = max_of<int64_t>(ceil_div(seq_len, tokens), 1), all = matrices * head_tiles;
  if (matrices < 1 || matrices > kMostHeads || all >= int64_t{1} << 31) return plan;
  int64_t blocks = min_of<int64_t>(sm_count, max_of<int64_t>(all / kLeastTiles, 1));
  if (all * tokens > blocks * kLongestShare) {
    blocks = round_up<int64_t>(ceil_div(all * tokens, kLongestShare), sm_count);
  }
  // As many blocks for every head, where that leaves few multiprocessors idle and shares are short: then no block pays
  // for pieces of two heads.
  const int64_t even = blocks / matrices * matrices;
  if (32 * even >= 31 * blocks && all <= even * kShortShare) blocks = even;
  const bool short_heads = head_tiles * tokens <= kLongestShare;
  if (short_heads && ceil_div<int64_t>(matrices, sm_count) * head_tiles <= ceil_div(all, blocks) + kPieceTiles) {
    blocks = matrices;
  }
  plan.stream_blocks = static_cast<int32_t>(blocks);
  plan.head_tiles = static_cast<int32_t>(head_tiles);
  plan.group = static_cast<int32_t>(matrices);
  plan.sum_chunks = static_cast<int32_t>(clamp<int64_t>(ceil_div<int64_t>(8 * sm_count, matrices), 1,
                                                        clamp<int64_t>(ceil_div<int64_t>(seq_len, 64), 1, kMostSums)));
  return plan;
}

/// The plan for one launch with a block for each head, which keeps all its tokens; unchanged where they are too many.
constexpr SpectrumPlan small_plan(SpectrumPlan plan, int64_t seq_len) {
  constexpr int64_t kMostTokens = 256;
  if (plan.tile > 128 || seq_len > kMostTokens) return plan;
  plan.tile_tokens = static_cast<int32_t>(max_of<int64_t>(round_up<int64_t>(seq_len, 16), 16));
  return plan;
}

}  // namespace uncomp
