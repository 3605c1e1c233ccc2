// SPDX-License-Identifier: Apache-2.0
// The sm_90a path of ragged_attention: what its files share.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/query_shares.h"
#include "kernels/ragged_attention/ragged_attention.h"

namespace uncomp::kernels {

/// Packed queries of a warpgroup.
inline constexpr int32_t kGroupQueries = 64;
/// Most warpgroups of a block that compute; one more loads.
inline constexpr int32_t kMostGroups = 2;
/// Most key or value tiles in shared memory.
inline constexpr int32_t kMostSlots = 8;

/// Keys of a tile.
UNCOMP_HD constexpr int32_t warpgroup_keys(int32_t dim) { return dim <= 128 ? 128 : 64; }

/// Query tiles, counted over all rows, at which a worker's share begins or ends; -1: none.
struct ShareEnds {
  int32_t entered;  // another worker began it
  int32_t left;     // another worker goes on with it
};

/// How a call is spread over workers, one block each, and what they leave behind for the joining launch.
struct WarpgroupPlan {
  int32_t dim;            // channels that the kernel is compiled for
  int32_t groups;         // warpgroups that compute, kGroupQueries packed queries each
  int32_t slots;          // key and value tiles in shared memory
  int32_t query_buffers;  // 1 or 2 query tiles in shared memory
  int32_t tiles_of_row;   // query tiles
  Divisor by_tiles_of_row, by_group_size;
  int32_t workers;
  ShareEnds* ends;  // [workers]
  float2* state;    // [2 * workers, queries of a tile]: top (log2), sum; places as in core/query_shares.h
  float* out;       // [2 * workers, queries of a tile, Dv] unnormalised

  UNCOMP_HD int32_t queries() const { return kGroupQueries * groups; }  // of a tile
};

/// The arenas and the new tokens as tensors of the copy engine, in boxes of 64 channels by a tile's keys.
struct RaggedMaps {
  CUtensorMap key_rows, value_rows;  // [C, D]
  CUtensorMap key, value;            // [B, Hkv, T, D]; unused without new tokens
};

/// Whether the current device and this call suit the path; fills `plan` but for its pointers then.
cudaError_t plan_warpgroups(const RaggedAttentionParams& params, WarpgroupPlan* plan, bool* suits);

/// Bytes of the plan's workspace; its pointers when `memory` is given.
int64_t cut_warpgroup_workspace(const RaggedAttentionParams& params, void* memory, WarpgroupPlan* plan);

cudaError_t encode_maps(const RaggedAttentionParams& params, const WarpgroupPlan& plan, RaggedMaps* maps);

/// One launch for each element type; each lives in its own file.
cudaError_t launch_warpgroups_fp16(const RaggedAttentionParams&, const WarpgroupPlan&, const RaggedMaps&, cudaStream_t);
cudaError_t launch_warpgroups_bf16(const RaggedAttentionParams&, const WarpgroupPlan&, const RaggedMaps&, cudaStream_t);

/// Joins the parts of every tile that several workers did.
cudaError_t launch_join_shares(const RaggedAttentionParams&, const WarpgroupPlan&, cudaStream_t);

}  // namespace uncomp::kernels
