// SPDX-License-Identifier: Apache-2.0
// How the live slots of ragged rows are cut into equal work. The rows' blocks of kSplitSlots slots are laid side by
// side; worker w takes the blocks [w * quota, (w + 1) * quota) of that line, whatever rows they belong to, so nobody
// has more than its share however skewed the lengths are. A row has the same pieces whenever the lengths are the same.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "core/ragged.h"

namespace uncomp {

/// Slots of one block of work.
inline constexpr int32_t kSplitSlots = 64;
/// Fewest blocks that are worth a worker: below it, merging costs more than it saves.
inline constexpr int64_t kMinSplitQuota = 2;
/// Workers hold at most this many pieces of rows that others share: the end of one row, the start of another.
inline constexpr int32_t kPartialsPerWorker = 2;

/// Blocks of a row. `lead` more stand for the time that opening a row takes a worker: one that ends a row and opens the
/// next then has fewer slots than the others instead of finishing after them.
UNCOMP_HD constexpr int64_t split_blocks(int32_t len, int32_t lead = 0) {
  return len > 0 ? lead + (int64_t{len} + kSplitSlots - 1) / kSplitSlots : 0;
}

/// Blocks that each worker takes. The slots of an arena are counted in 31 bits, so are its blocks.
UNCOMP_HD constexpr int64_t split_quota(int64_t total_blocks, int32_t workers) {
  return max_of<int64_t>(ceil_div(static_cast<int32_t>(total_blocks), workers), kMinSplitQuota);
}

/// Rows [begin, end) that one of `parts` helpers counts while the blocks are summed up.
struct RowSegment {
  int32_t begin, end;
};
UNCOMP_HD constexpr RowSegment row_segment(int32_t num_rows, int32_t part, int32_t parts) {
  const int64_t width = ceil_div<int64_t>(num_rows, parts);
  return {static_cast<int32_t>(min_of<int64_t>(part * width, num_rows)),
          static_cast<int32_t>(min_of<int64_t>((part + 1) * width, num_rows))};
}

UNCOMP_HD inline int64_t segment_blocks(const RaggedRows& rows, RowSegment segment, int32_t lead = 0) {
  int64_t blocks = 0;
  for (int32_t r = segment.begin; r < segment.end; ++r) blocks += split_blocks(rows.len(r), lead);
  return blocks;
}

/// A row and the block of the line at which it starts.
struct RowCursor {
  int32_t row;
  int64_t first_block;
};

/// The row that owns `block`; `segment` starts at block `first_block` and holds it.
UNCOMP_HD inline RowCursor find_row(const RaggedRows& rows, RowSegment segment, int64_t first_block, int64_t block,
                                    int32_t lead = 0) {
  for (int32_t r = segment.begin; r < segment.end; ++r) {
    const int64_t blocks = split_blocks(rows.len(r), lead);
    if (block < first_block + blocks) return {r, first_block};
    first_block += blocks;
  }
  return {rows.num_rows, first_block};
}

/// One worker's share of one row.
struct RowPiece {
  int32_t row;
  int32_t slot_begin, slot_end;  // inside the row; empty only where the share ends within the row's lead
  bool starts, ends;             // holds the row's first, last block
};

/// Walks the pieces of one worker:  for (SplitWalk walk(...); !walk.done();) { piece = walk.next(rows); ... }
class SplitWalk {
 public:
  SplitWalk() = default;
  /// `cursor` is the row that owns block worker * quota; not read when that block is beyond the line.
  UNCOMP_HD SplitWalk(int32_t worker, int64_t quota, int64_t total_blocks, RowCursor cursor, int32_t lead = 0)
      : block_(min_of(worker * quota, total_blocks)),
        end_(min_of(block_ + quota, total_blocks)),
        cursor_(cursor),
        lead_(lead) {}

  UNCOMP_HD bool done() const { return block_ >= end_; }

  UNCOMP_HD RowPiece next(const RaggedRows& rows) {
    cursor_.row = min_of(cursor_.row, rows.num_rows - 1);
    int32_t len = rows.len(cursor_.row);
    while (len == 0 && cursor_.row + 1 < rows.num_rows) len = rows.len(++cursor_.row);
    const int64_t blocks = split_blocks(len, lead_), skipped = block_ - cursor_.first_block;
    const int64_t taken = min_of(end_, cursor_.first_block + blocks) - block_;
    const auto slot = [&](int64_t block) {
      return static_cast<int32_t>(min_of<int64_t>(max_of<int64_t>(block - lead_, 0) * kSplitSlots, len));
    };
    const RowPiece piece{cursor_.row, slot(skipped), slot(skipped + taken), skipped == 0, skipped + taken == blocks};
    last_block_ = cursor_.first_block + blocks - 1;
    block_ = taken > 0 ? block_ + taken : end_;  // lengths that change meanwhile end the walk instead of hanging it
    if (piece.ends) cursor_ = {cursor_.row + 1, last_block_ + 1};
    return piece;
  }

  /// Last block of the row of the latest piece: the worker last_block() / quota holds the row's end.
  UNCOMP_HD int64_t last_block() const { return last_block_; }

 private:
  int64_t block_, end_;
  RowCursor cursor_;
  int32_t lead_;
  int64_t last_block_;
};

/// Where a worker keeps its part of a shared row. A row that starts in a worker and ends in a later one is that
/// worker's last piece and takes the second place; what started earlier takes the first.
UNCOMP_HD constexpr int64_t partial_index(int32_t worker, bool starts) {
  return int64_t{worker} * kPartialsPerWorker + (starts ? 1 : 0);
}

}  // namespace uncomp
