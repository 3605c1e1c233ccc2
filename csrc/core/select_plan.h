// SPDX-License-Identifier: Apache-2.0
// How select_tokens spreads its rows over a device.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace uncomp {

/// A warp reads its columns in chunks: four neighbouring columns a lane.
inline constexpr int32_t kSelectChunk = 128;
/// Bits of a digit, for short rows and for the others.
inline constexpr int32_t kSelectShortBits = 10, kSelectBits = 12;
/// Bins of a histogram whose sum is kept beside it: one for each lane.
inline constexpr int32_t kSelectGroup = 32;
/// Words of shared memory for counters and sums over warps.
inline constexpr int32_t kSelectScratchWords = 320;
inline constexpr int32_t kSelectMaxThreads = 1024;
/// Blocks of a row at most: the cluster size that every sm_90 device grants.
inline constexpr int32_t kSelectMaxBlocks = 8;
/// Columns of a short row.
inline constexpr int64_t kSelectShort = 2048;

/// Undecided tokens that are listed and ranked; more are told apart by further digits.
constexpr int32_t select_list(int32_t bits) { return bits == kSelectShortBits ? 512 : 2048; }
/// Words of a histogram and the sums of its groups.
constexpr int32_t select_histogram_words(int32_t bits) { return (1 << bits) + (1 << bits) / kSelectGroup; }

struct SelectPlan {
  int32_t blocks;  // of a row, a power of two; more than one form a cluster
  int32_t log_blocks;
  int32_t threads;      // of a block, whole warps, at least two
  int32_t warp_chunks;  // that a warp owns
  int32_t bits;         // of a digit
  bool cached;          // the keys lie in shared memory; otherwise in the workspace
  int32_t shared_bytes;
  float pool_width, pool_inverse;

  constexpr int64_t covered() const { return int64_t{blocks} * (threads / 32) * warp_chunks * kSelectChunk; }
};

/// Shared memory of a block before its keys.
constexpr int32_t select_shared_bytes(int32_t bits, bool cluster) {
  return 4 * (kSelectScratchWords + 2 * select_histogram_words(bits) + (cluster ? 4 : 2) * select_list(bits));
}

/// Blocks that a row is worth on a device of `sm_count`: all blocks must fit side by side, and each needs enough
/// columns to outweigh the cluster's barriers.
constexpr int32_t select_blocks(int64_t num_rows, int64_t columns, int32_t sm_count) {
  int32_t blocks = kSelectMaxBlocks;
  while (blocks > 1 && (num_rows * blocks > sm_count || columns < int64_t{2048} * blocks)) blocks /= 2;
  return blocks;
}

/// `width` are the columns and what lies between the last 16-byte border before a row and the row.
constexpr SelectPlan select_plan(int64_t width, int32_t pool, int64_t shared_limit, int32_t blocks) {
  const int32_t bits = width <= kSelectShort + 3 && blocks == 1 ? kSelectShortBits : kSelectBits;
  const int64_t chunks = max_of<int64_t>(ceil_div<int64_t>(width, int64_t{blocks} * kSelectChunk), 1);
  // Two chunks a warp hide each other's latency; from four on more warps do.
  const int64_t warps = clamp<int64_t>(ceil_div<int64_t>(chunks, chunks <= 32 ? 2 : 4), 2, kSelectMaxThreads / 32);
  const int64_t owned = ceil_div(chunks, warps);
  int64_t shared = select_shared_bytes(bits, blocks > 1);
  const int64_t keys = 4 * kSelectChunk * owned * warps;
  const bool cached = shared + keys <= shared_limit;
  if (cached) shared += keys;
  int32_t log_blocks = 0;
  while (1 << log_blocks < blocks) ++log_blocks;
  return {blocks,
          log_blocks,
          static_cast<int32_t>(32 * warps),
          static_cast<int32_t>(owned),
          bits,
          cached,
          static_cast<int32_t>(shared),
          static_cast<float>(pool),
          1.0f / static_cast<float>(pool)};
}

static_assert(select_shared_bytes(kSelectBits, true) <= 99 * 1024, "a block must fit on every device");

}  // namespace uncomp
