// SPDX-License-Identifier: Apache-2.0
// Few short rows: one cluster a row, in one launch (sm_90). Each block attends over an equal slice of its row; the
// states meet over distributed shared memory, and every block finishes an equal part of the row's result.
#pragma once

#include "core/math.h"
#include "kernels/common/cluster.cuh"
#include "kernels/common/dependent.cuh"
#include "kernels/decode_attention/slice.cuh"
#include "kernels/decode_attention/workspace.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {

__device__ __forceinline__ float cluster_read_float(const float& x, uint32_t rank) {
  return __uint_as_float(cluster_read(reinterpret_cast<const uint32_t*>(&x), rank));
}

template <class T, int kTile, int kHeads>
__global__ void __launch_bounds__(kSliceThreads, 2)
    row_cluster_kernel(const __grid_constant__ DecodeAttentionParams params, const int32_t ranks) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<SliceShared<T, kTile, kHeads>*>(memory);
  __shared__ float top[kHeads], sum[kHeads];  // of this block
  const int32_t row = blockIdx.x / ranks, rank = blockIdx.x % ranks;
  const int32_t heads = params.group_size, value_dim = params.value_dim;

  wait_for_previous();
  let_next_start();
  const int64_t query = row / params.rows_per_sequence * params.query_batch_stride +
                        row % params.rows_per_sequence * heads * params.query_head_stride;
  const QueryInFlight<T, kTile, kHeads> fetched(static_cast<const T*>(params.query) + query, params.query_head_stride,
                                                heads, params.key_dim);
  const int32_t len = params.rows.len(row);
  const int32_t share = ceil_div(ceil_div(len, kWarpSlots), ranks) * kWarpSlots;
  const int32_t begin = min_of(rank * share, len), count = min_of(share, len - begin);
  const int64_t slot = params.rows.start(row) + begin;
  attend_slice(shared, static_cast<const T*>(params.key_rows) + slot * params.key_dim,
               static_cast<const T*>(params.value_rows) + slot * value_dim, count, params.key_dim, value_dim,
               params.scale * kLog2E, NoScores{}, [&] {
                 fetched.store(shared);
                 __syncthreads();
               });

  // The block's state takes the place of its first warp's.
  const int32_t results = heads * value_dim;
  for (int32_t i = threadIdx.x; i < results; i += kSliceThreads) {
    const int32_t head = i / value_dim, channel = i % value_dim;
    const HeadState state = merge_warps(shared, head, channel);
    shared.out[0][head][channel] = state.out;
    if (channel == 0) {
      top[head] = state.top;
      sum[head] = state.sum;
    }
  }
  cluster_barrier();
  const int32_t part = ceil_div(results, ranks), end = min_of((rank + 1) * part, results);
  for (int32_t i = rank * part + threadIdx.x; i < end; i += kSliceThreads) {
    const int32_t head = i / value_dim, channel = i % value_dim;
    HeadState state{-INFINITY, 0.0f, 0.0f};
    for (int32_t first = 0; first < ranks; first += kFewestRanks) {
      HeadState other[kFewestRanks];
      float best = state.top;
#pragma unroll
      for (int r = 0; r < kFewestRanks; ++r) {
        other[r].top = cluster_read_float(top[head], first + r);
        other[r].sum = cluster_read_float(sum[head], first + r);
        other[r].out = cluster_read_float(shared.out[0][head][channel], first + r);
      }
#pragma unroll
      for (int r = 0; r < kFewestRanks; ++r) best = fmaxf(best, other[r].top);
      const float base = finite_or_zero(best), shrink = exp2f(state.top - base);
      state = {best, state.sum * shrink, state.out * shrink};
#pragma unroll
      for (int r = 0; r < kFewestRanks; ++r) {
        const float weight = exp2f(other[r].top - base);
        state.sum += weight * other[r].sum;
        state.out += weight * other[r].out;
      }
    }
    static_cast<T*>(params.out)[int64_t{row} * results + i] = from_float<T>(normalised(state.out, state.sum));
    if (channel == 0) params.lse[int64_t{row} * heads + head] = log_sum_exp(state.top, state.sum);
  }
  cluster_barrier();  // no block leaves while another reads it
}

/// Launches clusters if the device can hold them; `launched` tells.
template <class T, int kTile, int kHeads>
cudaError_t launch_row_clusters(const DecodeAttentionParams& params, int32_t ranks, cudaStream_t stream,
                                bool* launched) {
  constexpr size_t kBytes = sizeof(SliceShared<T, kTile, kHeads>);
  const auto kernel = row_cluster_kernel<T, kTile, kHeads>;
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t err = allow_shared_memory(address, kBytes); err != cudaSuccess) return err;
  if (const cudaError_t err = allow_large_clusters(address); err != cudaSuccess) return err;
  if (const cudaError_t err = cluster_fits(address, ranks, kSliceThreads, kBytes, launched);
      err != cudaSuccess || !*launched) {
    return err;
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(params.rows.num_rows * ranks));
  config.blockDim = dim3(kSliceThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, params, ranks);
}

}  // namespace uncomp::kernels
