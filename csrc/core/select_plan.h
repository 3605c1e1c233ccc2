// SPDX-License-Identifier: Apache-2.0
// How select_tokens spreads its rows over a device.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace uncomp {

/// Bits of the three digits of a key, highest digit first.
inline constexpr int32_t kSelectBits1 = 11, kSelectBits2 = 11, kSelectBits3 = 10;
inline constexpr int32_t kSelectBins1 = 1 << kSelectBits1, kSelectBins2 = 1 << kSelectBits2,
                         kSelectBins3 = 1 << kSelectBits3;
/// Words of shared memory before a block's keys: the three histograms, then room for sums over warps.
inline constexpr int32_t kSelectHistogramWords = kSelectBins1 + kSelectBins2 + kSelectBins3;
inline constexpr int32_t kSelectScratchWords = 256;
/// Columns that a block loads at once when its slice does not fit into shared memory.
inline constexpr int32_t kSelectStage = 16384;
inline constexpr int32_t kSelectMaxThreads = 1024;
/// Blocks of a row at most: the cluster size that every sm_90 device grants.
inline constexpr int32_t kSelectMaxBlocks = 8;

struct SelectPlan {
  int32_t blocks;           // of a row; more than one form a cluster
  int32_t threads;          // of a block, a power of two
  int32_t stage;            // columns in shared memory at once
  bool resident;            // a block's keys stay in shared memory; otherwise they go through the workspace
  int64_t shared_bytes;     // of a block
  int64_t workspace_bytes;  // of the launch
};

/// Blocks that a row is worth on a device of `sm_count`: all blocks must fit side by side, and each needs enough
/// columns to outweigh the cluster's barriers.
constexpr int32_t select_blocks(int64_t num_rows, int64_t columns, int32_t sm_count) {
  int32_t blocks = kSelectMaxBlocks;
  while (blocks > 1 && (num_rows * blocks > sm_count || columns < int64_t{1024} * blocks)) blocks /= 2;
  return blocks;
}

constexpr SelectPlan select_plan(int64_t num_rows, int64_t columns, int32_t pool, int64_t shared_limit,
                                 int32_t blocks) {
  const int64_t slice = ceil_div<int64_t>(columns, blocks), halo = pool - 1;
  int32_t threads = 128;
  while (threads < kSelectMaxThreads && int64_t{threads} * 4 < slice) threads *= 2;
  const int64_t fixed = 4 * (kSelectHistogramWords + kSelectScratchWords);
  const bool resident = fixed + 4 * (slice + halo) <= shared_limit;
  const int64_t stage = resident ? slice : kSelectStage;
  return {blocks,
          threads,
          static_cast<int32_t>(stage),
          resident,
          fixed + 4 * (stage + halo),
          resident ? 0 : 4 * num_rows * columns};
}

static_assert(kSelectBits1 + kSelectBits2 + kSelectBits3 == 32);
static_assert(kSelectMaxThreads <= kSelectBins3, "every thread owns whole bins");
static_assert(4 * (kSelectHistogramWords + kSelectScratchWords + kSelectStage + 128) <= 99 * 1024,
              "the staged variant must fit on every device");

}  // namespace uncomp
