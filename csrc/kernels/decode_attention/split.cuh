// SPDX-License-Identifier: Apache-2.0
// The split kernel: one block a worker, each with an equal share of all rows' blocks (core/splits.h), found from the
// device's lengths by the block itself.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/decode_attention/slice.cuh"
#include "kernels/decode_attention/workspace.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {

/// A worker's share: quota, length of the line of blocks, and the row that owns its first block. All threads of the
/// block count a segment of rows each; the same numbers in every block, because they depend on the lengths only.
struct WorkerShare {
  int64_t quota, total;
  RowCursor cursor;
};

__device__ __forceinline__ WorkerShare find_share(const RaggedRows& rows, int32_t worker, int32_t workers) {
  __shared__ int64_t warp_blocks[kSliceWarps];
  __shared__ RowCursor found;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const RowSegment segment = row_segment(rows.num_rows, threadIdx.x, kSliceThreads);
  const int64_t mine = segment_blocks(rows, segment);
  int64_t before = mine;  // inclusive scan over the warp
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t other = __shfl_up_sync(kFullWarp, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) warp_blocks[warp] = before;
  __syncthreads();
  WorkerShare share{};
  before -= mine;
#pragma unroll
  for (int w = 0; w < kSliceWarps; ++w) {
    if (w < warp) before += warp_blocks[w];
    share.total += warp_blocks[w];
  }
  share.quota = split_quota(share.total, workers);
  const int64_t block = worker * share.quota;
  if (block >= before && block < before + mine) found = find_row(rows, segment, before, block);
  __syncthreads();
  if (block < share.total) share.cursor = found;
  return share;
}

template <class T, int kTile, int kHeads>
__global__ void __launch_bounds__(kSliceThreads, 2)
    split_kernel(const __grid_constant__ DecodeAttentionParams params, const __grid_constant__ DecodeWorkspace work) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<SliceShared<T, kTile, kHeads>*>(memory);
  const int32_t worker = blockIdx.x, heads = params.group_size, value_dim = params.value_dim;
  const RaggedRows& rows = params.rows;
  T* out = static_cast<T*>(params.out);

  // Rows without tokens belong to no worker.
  for (int32_t row = worker; row < rows.num_rows; row += work.workers) {
    if (rows.len(row) > 0) continue;
    const int64_t head = static_cast<int64_t>(row) * heads;
    for (int i = threadIdx.x; i < heads * value_dim; i += kSliceThreads)
      out[head * value_dim + i] = from_float<T>(0.0f);
    if (threadIdx.x < heads) params.lse[head + threadIdx.x] = -INFINITY;
  }

  const WorkerShare share = find_share(rows, worker, work.workers);
  OpenRow open{-1, -1};
  for (SplitWalk walk(worker, share.quota, share.total, share.cursor); !walk.done();) {
    const RowPiece piece = walk.next(rows);
    const int64_t slot = rows.start(piece.row) + piece.slot_begin;
    const int64_t query = piece.row / params.rows_per_sequence * params.query_batch_stride +
                          piece.row % params.rows_per_sequence * heads * params.query_head_stride;
    load_query(shared, static_cast<const T*>(params.query) + query, params.query_head_stride, heads, params.key_dim);
    __syncthreads();
    attend_slice(shared, static_cast<const T*>(params.key_rows) + slot * params.key_dim,
                 static_cast<const T*>(params.value_rows) + slot * value_dim, piece.slot_end - piece.slot_begin,
                 params.key_dim, value_dim, params.scale * kLog2E);

    // A whole row is written as it is, a part of one as a softmax state.
    const bool whole = piece.starts && piece.ends;
    const int64_t first_head = static_cast<int64_t>(piece.row) * heads;
    float* partial = work.partial + partial_index(worker, piece.starts) * work.stride;
    for (int i = threadIdx.x; i < heads * value_dim; i += kSliceThreads) {
      const int head = i / value_dim, channel = i % value_dim;
      const HeadState state = merge_warps(shared, head, channel);
      if (whole) {
        out[first_head * value_dim + i] = from_float<T>(normalised(state.out, state.sum));
        if (channel == 0) params.lse[first_head + head] = log_sum_exp(state.top, state.sum);
      } else {
        partial[i] = state.out;
        if (channel == 0) {
          partial[heads * value_dim + head] = state.top;
          partial[heads * value_dim + heads + head] = state.sum;
        }
      }
    }
    if (piece.starts && !piece.ends) open = {piece.row, static_cast<int32_t>(walk.last_block() / share.quota)};
    __syncthreads();
  }
  if (threadIdx.x == 0) work.open[worker] = open;
}

template <class T, int kTile, int kHeads>
cudaError_t launch_split(const DecodeAttentionParams& params, const DecodeWorkspace& work, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(SliceShared<T, kTile, kHeads>);
  const auto kernel = split_kernel<T, kTile, kHeads>;
  if (const cudaError_t err = allow_shared_memory(reinterpret_cast<const void*>(kernel), kBytes); err != cudaSuccess) {
    return err;
  }
  kernel<<<work.workers, kSliceThreads, kBytes, stream>>>(params, work);
  return cudaGetLastError();
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

}  // namespace uncomp::kernels
