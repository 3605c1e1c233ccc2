// SPDX-License-Identifier: Apache-2.0
// How a worker finds its share of the query tiles from the lengths on the device.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/reduce.cuh"
#include "kernels/ragged_attention/rows.cuh"
#include "kernels/ragged_attention/warpgroups.h"

namespace uncomp::kernels {

/// A query tile and the keys that it sees.
struct QueryTile {
  QueryRow row;
  int32_t m_begin;  // first packed query
  QueryTileKeys keys;
};

/// `kKeys` keys a key tile.
template <int kKeys>
__device__ __forceinline__ QueryTile query_tile(const RaggedAttentionParams& params, const WarpgroupPlan& plan,
                                                int32_t tile) {
  const int32_t row_index = plan.by_tiles_of_row.divide(tile), queries = plan.queries();
  const QueryRow row = query_row(params, row_index);
  const int32_t m_begin = (tile - row_index * plan.tiles_of_row) * queries;
  return {row, m_begin,
          query_tile_keys(kKeys, plan.by_group_size.divide(m_begin), plan.by_group_size.divide(m_begin + queries - 1),
                          row.first, row.count, params.rows.len(row_index), params.key != nullptr)};
}

/// Units of a worker: the first one is unit `done` of query tile `tile`.
struct Share {
  int32_t tile, done;
  int64_t units;
};

/// What is left of a share while it is walked.
struct ShareWalk {
  Share left;

  __device__ __forceinline__ bool more() const { return left.units > 0; }
  __device__ __forceinline__ TilePart part(const QueryTile& tile) const {
    return next_part(tile.keys.units(), left.done, left.units);
  }
  __device__ __forceinline__ void step(const TilePart& part) {
    left.units -= part.end - part.begin;
    left.done = 0;
    ++left.tile;
  }
};

struct ShareScratch {
  int64_t sums[32];
  Share share;
};

/// The share of block blockIdx.x. Each thread counts the units of neighbouring tiles; the one whose tiles hold the
/// first unit walks to it. Barriers inside.
template <int kKeys>
__device__ __forceinline__ Share find_share(const RaggedAttentionParams& params, const WarpgroupPlan& plan,
                                            ShareScratch& scratch) {
  const int64_t tiles = int64_t{plan.tiles_of_row} * params.rows.num_rows;
  const int32_t each = static_cast<int32_t>(ceil_div(static_cast<uint32_t>(tiles), blockDim.x));
  const int32_t begin = static_cast<int32_t>(min_of<int64_t>(int64_t{threadIdx.x} * each, tiles));
  const int32_t end = static_cast<int32_t>(min_of<int64_t>(int64_t{begin} + each, tiles));
  int64_t mine = 0, total = 0;
  for (int32_t tile = begin; tile < end; ++tile) mine += query_tile<kKeys>(params, plan, tile).keys.units();
  int64_t before = block_exclusive_sum(mine, scratch.sums, &total);
  const int64_t most = share_units(total, plan.workers), first = blockIdx.x * most;
  if (threadIdx.x == 0 && first >= total) scratch.share = {0, 0, 0};
  if (before <= first && first < before + mine) {
    int32_t tile = begin;
    for (int32_t units; before + (units = query_tile<kKeys>(params, plan, tile).keys.units()) <= first; ++tile) {
      before += units;
    }
    scratch.share = {tile, static_cast<int32_t>(first - before), min_of(most, total - first)};
  }
  __syncthreads();
  return scratch.share;
}

/// The tiles at both ends of a share that other workers have parts of.
template <int kKeys>
__device__ __forceinline__ ShareEnds share_ends(const RaggedAttentionParams& params, const WarpgroupPlan& plan,
                                                const Share& share) {
  ShareEnds ends{-1, -1};
  for (ShareWalk walk{share}; walk.more();) {
    const int32_t index = walk.left.tile;
    const TilePart part = walk.part(query_tile<kKeys>(params, plan, index));
    if (part.begin > 0) ends.entered = index;
    if (part.begin == 0 && part.end < part.units) ends.left = index;
    walk.step(part);
  }
  return ends;
}

}  // namespace uncomp::kernels
