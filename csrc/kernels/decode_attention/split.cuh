// SPDX-License-Identifier: Apache-2.0
// The split kernel: one block a worker, each with an equal share of all rows' blocks (core/splits.h), found from the
// device's lengths by the block itself.
#pragma once

#include "kernels/common/dependent.cuh"
#include "kernels/decode_attention/row_cluster.cuh"
#include "kernels/decode_attention/share.cuh"
#include "kernels/decode_attention/slice.cuh"
#include "kernels/decode_attention/workspace.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {

/// Shared memory of a block: two blocks fill that of a multiprocessor. Device code knows what it is compiled for, the
/// host asks.
template <class T, int kTile, int kHeads, bool kSm90>
using SplitShared = SliceShared<T, kTile, kHeads, kSm90 ? many_entries(kTile) : few_entries(kTile)>;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kForSm90 = true;
#else
inline constexpr bool kForSm90 = false;
#endif

/// Four neighbours of an output tensor, whose storage is aligned.
template <class T>
__device__ __forceinline__ void store4(T* to, float a, float b, float c, float d) {
  *reinterpret_cast<uint2*>(to) = {pack2<T>(a, b), pack2<T>(c, d)};
}
__device__ __forceinline__ void store4(float* to, float a, float b, float c, float d) {
  *reinterpret_cast<float4*>(to) = {a, b, c, d};
}

template <class T, int kTile, int kHeads>
__global__ void __launch_bounds__(kSliceThreads, 2)
    split_kernel(const __grid_constant__ DecodeAttentionParams params, const __grid_constant__ DecodeWorkspace work) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<SplitShared<T, kTile, kHeads, kForSm90>*>(memory);
  const int32_t worker = blockIdx.x, heads = params.group_size, value_dim = params.value_dim;
  const RaggedRows& rows = params.rows;
  T* out = static_cast<T*>(params.out);
  wait_for_previous();
  let_next_start();

  const WorkerShare share = find_share<kSliceWarps>(rows, worker, work.workers);
  OpenRow open{-1, -1};
  for (SplitWalk walk(worker, share.quota, share.total, share.cursor); !walk.done();) {
    const RowPiece piece = walk.next(rows);
    const int64_t slot = rows.start(piece.row) + piece.slot_begin;
    const int64_t query = piece.row / params.rows_per_sequence * params.query_batch_stride +
                          piece.row % params.rows_per_sequence * heads * params.query_head_stride;
    const QueryInFlight<T, kTile, kHeads> fetched(static_cast<const T*>(params.query) + query, params.query_head_stride,
                                                  heads, params.key_dim);
    attend_slice(shared, static_cast<const T*>(params.key_rows) + slot * params.key_dim,
                 static_cast<const T*>(params.value_rows) + slot * value_dim, piece.slot_end - piece.slot_begin,
                 params.key_dim, value_dim, params.scale * kLog2E, NoScores{}, [&] {
                   fetched.store(shared);
                   __syncthreads();
                 });

    // A whole row is written as it is, a part of one as a softmax state.
    const bool whole = piece.starts && piece.ends;
    const int64_t first_head = static_cast<int64_t>(piece.row) * heads;
    float* partial = work.partial + partial_index(worker, piece.starts) * work.stride;
    for (int i = 4 * threadIdx.x; i < heads * value_dim; i += 4 * kSliceThreads) {
      const int head = i / value_dim, channel = i % value_dim;
      const HeadStates4 state = merge_warps4(shared, head, channel);
      if (whole) {
        store4(out + first_head * value_dim + i, normalised(state.out.x, state.sum), normalised(state.out.y, state.sum),
               normalised(state.out.z, state.sum), normalised(state.out.w, state.sum));
        if (channel == 0) params.lse[first_head + head] = log_sum_exp(state.top, state.sum);
      } else {
        *reinterpret_cast<float4*>(partial + i) = state.out;
        if (channel == 0) {
          partial[heads * value_dim + head] = state.top;
          partial[heads * value_dim + heads + head] = state.sum;
        }
      }
    }
    if (piece.starts && !piece.ends) {
      open = {piece.row, static_cast<int32_t>(walk.last_block()) / static_cast<int32_t>(share.quota)};
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) work.open[worker] = open;
}

template <class T, int kTile, int kHeads>
cudaError_t launch_split(const DecodeAttentionParams& params, const DecodeWorkspace& work, cudaStream_t stream) {
  const auto kernel = split_kernel<T, kTile, kHeads>;
  const void* const address = reinterpret_cast<const void*>(kernel);
  bool sm_90 = false;
  if (const cudaError_t err = compiled_for_sm_90(address, &sm_90); err != cudaSuccess) return err;
  const size_t bytes =
      sm_90 ? sizeof(SplitShared<T, kTile, kHeads, true>) : sizeof(SplitShared<T, kTile, kHeads, false>);
  if (const cudaError_t err = allow_shared_memory(address, bytes); err != cudaSuccess) return err;
  return launch_dependent(kernel, sm_90, dim3(static_cast<unsigned>(work.workers)), kSliceThreads, bytes, stream,
                          params, work);
}

/// Picks the smallest tile that holds both head dims, and one or two tiles of 8 heads; two tiles with a
/// small head dim are too rare to be compiled apart.
template <class T>
cudaError_t launch_split_half(const DecodeAttentionParams& params, const DecodeWorkspace& work, cudaStream_t stream) {
  const int32_t dim = max_of(params.key_dim, params.value_dim);
  const bool few = params.group_size <= 8;
  if (dim <= 64 && few) return launch_split<T, 64, 8>(params, work, stream);
  if (dim <= 128) {
    return few ? launch_split<T, 128, 8>(params, work, stream) : launch_split<T, 128, 16>(params, work, stream);
  }
  return few ? launch_split<T, 256, 8>(params, work, stream) : launch_split<T, 256, 16>(params, work, stream);
}

/// Clusters are compiled for the common tiles only.
template <class T>
cudaError_t launch_clusters_half(const DecodeAttentionParams& params, int32_t ranks, cudaStream_t stream,
                                 bool* launched) {
  const int32_t dim = max_of(params.key_dim, params.value_dim);
  *launched = false;
  if (params.group_size > 8 || dim > 128) return cudaSuccess;
  return dim <= 64 ? launch_row_clusters<T, 64, 8>(params, ranks, stream, launched)
                   : launch_row_clusters<T, 128, 8>(params, ranks, stream, launched);
}

}  // namespace uncomp::kernels
