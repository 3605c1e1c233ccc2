// SPDX-License-Identifier: Apache-2.0
// Few short rows: one cluster a row, in one launch (sm_90). Each block attends over an equal slice of its row; the
// states meet over distributed shared memory, and every block finishes an equal part of the row's result.
// They are sent, not fetched: writing needs no round trip, and nobody has to stay for others to read.
#pragma once

#include "core/math.h"
#include "kernels/common/cluster.cuh"
#include "kernels/common/dependent.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/decode_attention/slice.cuh"
#include "kernels/decode_attention/workspace.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {

/// Ring of a warp that holds all that it attends to in the usual case.
constexpr int cluster_entries(int tile) { return tile == 64 ? 10 : 6; }

/// What the blocks of a cluster send to the one that finishes a part of the row.
template <int kTile, int kHeads>
struct RankInbox {
  alignas(16) float out[kHeads * kTile + 4 * kMostRanks];  // [ranks, part of the results]
  float top[kMostRanks][kHeads], sum[kMostRanks][kHeads];
};

template <class T, int kTile, int kHeads>
__global__ void __launch_bounds__(kSliceThreads, 2)
    row_cluster_kernel(const __grid_constant__ DecodeAttentionParams params, const int32_t ranks) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<SliceShared<T, kTile, kHeads, cluster_entries(kTile)>*>(memory);
  __shared__ RankInbox<kTile, kHeads> inbox;
  const int32_t row = blockIdx.x / ranks, rank = blockIdx.x % ranks;
  const int32_t heads = params.group_size, value_dim = params.value_dim;
  cluster_arrive();  // with the wait below: all blocks run before one writes into another

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

  // Each block sends its state to the inboxes of those that finish the parts.
  const int32_t results = heads * value_dim, part = round_up(ceil_div(results, ranks), 4);
  cluster_wait();
  for (int32_t i = 4 * threadIdx.x; i < results; i += 4 * kSliceThreads) {
    cluster_write(&inbox.out[rank * part + i % part], merge_warps4(shared, i / value_dim, i % value_dim).out, i / part);
  }
  for (int32_t i = threadIdx.x; i < ranks * heads; i += kSliceThreads) {
    const int32_t to = i / heads, head = i % heads;
    const HeadState state = merge_warps(shared, head, 0);
    cluster_write(&inbox.top[rank][head], state.top, to);
    cluster_write(&inbox.sum[rank][head], state.sum, to);
  }
  cluster_barrier();

  for (int32_t j = threadIdx.x, i = rank * part + j; j < part && i < results; j += kSliceThreads, i += kSliceThreads) {
    const int32_t head = i / value_dim, channel = i % value_dim;
    HeadState state{-INFINITY, 0.0f, 0.0f};
    for (int32_t r = 0; r < ranks; ++r) state.top = fmaxf(state.top, inbox.top[r][head]);
    const float base = finite_or_zero(state.top);
#pragma unroll 8
    for (int32_t r = 0; r < ranks; ++r) {
      const float weight = exp2f(inbox.top[r][head] - base);
      state.sum += weight * inbox.sum[r][head];
      state.out += weight * inbox.out[r * part + j];
    }
    static_cast<T*>(params.out)[int64_t{row} * results + i] = from_float<T>(normalised(state.out, state.sum));
    if (channel == 0) params.lse[int64_t{row} * heads + head] = log_sum_exp(state.top, state.sum);
  }
}

/// Launches clusters if the device can hold them; `launched` tells.
template <class T, int kTile, int kHeads>
cudaError_t launch_row_clusters(const DecodeAttentionParams& params, int32_t ranks, cudaStream_t stream,
                                bool* launched) {
  constexpr size_t kBytes = sizeof(SliceShared<T, kTile, kHeads, cluster_entries(kTile)>);
  const auto kernel = row_cluster_kernel<T, kTile, kHeads>;
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t err = allow_shared_memory(address, kBytes); err != cudaSuccess) return err;
  if (const cudaError_t err = allow_large_clusters(address); err != cudaSuccess) return err;
  if (const cudaError_t err = cluster_fits(address, ranks, kSliceThreads, kBytes, launched);
      err != cudaSuccess || !*launched) {
    return err;
  }
  const dim3 grid(static_cast<unsigned>(params.rows.num_rows * ranks));
  return launch_kernel({grid, kSliceThreads, kBytes, stream, ranks, /*early=*/true}, kernel, params, ranks);
}

}  // namespace uncomp::kernels
