// SPDX-License-Identifier: Apache-2.0
// What the files of ragged_attention share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/query_tiles.h"
#include "kernels/ragged_attention/ragged_attention.h"

namespace uncomp::kernels {

/// States of the parts into which the keys of every query tile are cut when there are too few tiles for the device.
struct RaggedWorkspace {
  float* out;     // [parts, queries, Dv] unnormalised
  float2* state;  // [parts, queries]: top (log2), sum
  int32_t parts;  // 1: results are written at once and there is no workspace
};

/// Most parts of one tile's keys: a lane of the joining warp each.
inline constexpr int32_t kMaxKeyParts = 32;

UNCOMP_HD inline int64_t query_count(const RaggedAttentionParams& params) {
  return int64_t{params.rows.num_rows} * params.group_size * params.tokens.seq_len;
}

inline int64_t tiles_per_row(const RaggedAttentionParams& params) {
  return ceil_div<int64_t>(int64_t{params.tokens.seq_len} * params.group_size, kQueryTile);
}

/// One launch for each element type; each lives in its own file.
cudaError_t launch_ragged_fp32(const RaggedAttentionParams&, const RaggedWorkspace&, cudaStream_t);
cudaError_t launch_ragged_fp16(const RaggedAttentionParams&, const RaggedWorkspace&, cudaStream_t);
cudaError_t launch_ragged_bf16(const RaggedAttentionParams&, const RaggedWorkspace&, cudaStream_t);

}  // namespace uncomp::kernels
