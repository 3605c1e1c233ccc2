// SPDX-License-Identifier: Apache-2.0
// What the workers of one decode_attention call leave for the merge.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/splits.h"
#include "kernels/decode_attention/decode_attention.h"

namespace uncomp::kernels {

/// A row that starts in a worker and ends in a later one.
struct OpenRow {
  int32_t row;          // -1: none
  int32_t last_worker;  // holds the row's end
};

/// Blocks of a row's cluster.
inline constexpr int32_t kMostRanks = 16, kFewestRanks = 8;

struct DecodeWorkspace {
  OpenRow* open;   // [workers]
  float* partial;  // [workers * kPartialsPerWorker, stride]: out [g, Dv] unnormalised, top [g] (log2), sum [g]
  int32_t workers;
  int32_t stride;    // floats
  int32_t lead = 0;  // blocks that opening a row is worth (core/splits.h)
};

inline int32_t partial_floats(int32_t group_size, int32_t value_dim) {
  return round_up(group_size * (value_dim + 2), 4);
}

/// Cuts `memory` (may be null) for `workers`; returns its size in bytes.
inline int64_t decode_workspace(const DecodeAttentionParams& params, int32_t workers, void* memory,
                                DecodeWorkspace* workspace) {
  const int64_t open_bytes = round_up<int64_t>(int64_t{workers} * sizeof(OpenRow), 16);
  const int32_t stride = partial_floats(params.group_size, params.value_dim);
  char* base = static_cast<char*>(memory);
  *workspace = {reinterpret_cast<OpenRow*>(base), reinterpret_cast<float*>(base == nullptr ? base : base + open_bytes),
                workers, stride, 0};
  return open_bytes + int64_t{workers} * kPartialsPerWorker * stride * static_cast<int64_t>(sizeof(float));
}

/// One launch for each element type; each lives in its own file.
cudaError_t launch_split_fp32(const DecodeAttentionParams&, const DecodeWorkspace&, cudaStream_t);
cudaError_t launch_split_fp16(const DecodeAttentionParams&, const DecodeWorkspace&, cudaStream_t);
cudaError_t launch_split_bf16(const DecodeAttentionParams&, const DecodeWorkspace&, cudaStream_t);

cudaError_t launch_latents_fp32(const DecodeAttentionParams&, const KeyTransformParams&, const DecodeWorkspace&,
                                cudaStream_t);
cudaError_t launch_latents_fp16(const DecodeAttentionParams&, const KeyTransformParams&, const DecodeWorkspace&,
                                cudaStream_t);
cudaError_t launch_latents_bf16(const DecodeAttentionParams&, const KeyTransformParams&, const DecodeWorkspace&,
                                cudaStream_t);

/// One cluster of `ranks` blocks a row, the whole operation; `launched` is false where that cannot be.
cudaError_t launch_clusters_fp16(const DecodeAttentionParams&, int32_t ranks, cudaStream_t, bool* launched);
cudaError_t launch_clusters_bf16(const DecodeAttentionParams&, int32_t ranks, cudaStream_t, bool* launched);

}  // namespace uncomp::kernels
