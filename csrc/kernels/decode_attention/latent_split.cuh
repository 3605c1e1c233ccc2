// SPDX-License-Identifier: Apache-2.0
// The split kernel over latents (latent_block.cuh); shares and parts are those of split.cuh.
#pragma once

#include "kernels/decode_attention/latent_block.cuh"
#include "kernels/decode_attention/latent_launch.cuh"
#include "kernels/decode_attention/latent_warpgroup.cuh"
#include "kernels/decode_attention/split.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {

/// What `shared` holds of a worker's piece: a whole row is written as it is, a part of one as a softmax state.
/// split_kernel has this loop in itself: called from there it costs registers.
template <class T, class Shared>
__device__ __forceinline__ void store_piece(const Shared& shared, const DecodeAttentionParams& params,
                                            const DecodeWorkspace& work, int32_t worker, const RowPiece& piece) {
  const int32_t heads = params.group_size, value_dim = params.value_dim;
  T* out = static_cast<T*>(params.out);
  const bool whole = piece.starts && piece.ends;
  const int64_t first_head = static_cast<int64_t>(piece.row) * heads;
  float* partial = work.partial + partial_index(worker, piece.starts) * work.stride;
  for (int i = 4 * threadIdx.x; i < heads * value_dim; i += 4 * Shared::kThreads) {
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
}

/// Basis and queries are on their way into the L2 cache while the block still looks for its share: behind the first
/// copies they would queue. All blocks together fetch the basis; the row is a guess that holds for rows of one length.
template <class T, int kThreads>
__device__ __forceinline__ void prefetch(const DecodeAttentionParams& params, const KeyTransformParams& transform,
                                         int32_t workers) {
  constexpr int64_t kLine = 128, kSize = sizeof(T);
  const auto fetch = [](const void* base, int64_t byte) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(base) + byte));
  };
  const int64_t kv_heads = params.rows_per_sequence / transform.rows_per_kv;
  const int64_t mine = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kLine;
  if (mine < kv_heads * params.key_dim * transform.dim * kSize) fetch(transform.basis, mine);
  const int32_t head = threadIdx.x % params.group_size, line = threadIdx.x / params.group_size;
  if (line * kLine < transform.dim * kSize) {
    const int32_t row = static_cast<int32_t>(static_cast<int64_t>(blockIdx.x) * params.rows.num_rows / workers);
    const int64_t query = row / params.rows_per_sequence * params.query_batch_stride +
                          (row % params.rows_per_sequence * params.group_size + head) * params.query_head_stride;
    fetch(static_cast<const T*>(params.query) + query, line * kLine);
  }
}

/// Block: LatentBlock or WarpgroupBlock.
template <class T, class Block>
__global__ void __launch_bounds__(Block::kThreads, Block::kBlocks)
    latent_split_kernel(const __grid_constant__ DecodeAttentionParams params,
                        const __grid_constant__ DecodeWorkspace work,
                        const __grid_constant__ KeyTransformParams transform) {
  extern __shared__ __align__(1024) unsigned char latent_memory[];
  // What is left to do waits in shared memory: attend needs the registers.
  __shared__ struct {
    SplitWalk walk;
    RowPiece piece;
    OpenRow open;
    int32_t quota;
  } left;
  Block block(latent_memory, transform, params.key_dim);
  const int32_t worker = blockIdx.x, heads = params.group_size;
  const RaggedRows& rows = params.rows;
  prefetch<T, Block::kThreads>(params, transform, work.workers);
  wait_for_previous();
  let_next_start();

  const WorkerShare share = find_share<Block::kWarps>(rows, worker, work.workers, work.lead);
  if (threadIdx.x == 0) {
    left.open = {-1, -1};
    left.quota = static_cast<int32_t>(share.quota);
  }
  for (SplitWalk walk(worker, share.quota, share.total, share.cursor, work.lead); !walk.done();) {
    const RowPiece piece = walk.next(rows);
    if (threadIdx.x == 0) {
      left.walk = walk;
      left.piece = piece;
      if (piece.starts && !piece.ends) {
        left.open = {piece.row, static_cast<int32_t>(walk.last_block()) / left.quota};
      }
    }
    const int32_t sequence = piece.row / params.rows_per_sequence, in_sequence = piece.row % params.rows_per_sequence;
    const LatentQuery<T> query{in_sequence / transform.rows_per_kv,
                               static_cast<const T*>(params.query) + sequence * params.query_batch_stride +
                                   in_sequence * heads * params.query_head_stride,
                               params.query_head_stride, heads, sequence};
    block.attend(query, static_cast<const T*>(params.key_rows), static_cast<const T*>(params.value_rows),
                 rows.start(piece.row) + piece.slot_begin, piece.slot_end - piece.slot_begin, params.value_dim,
                 params.scale * kLog2E);
    walk = left.walk;
    store_piece<T>(block.shared, params, work, worker, left.piece);
    __syncthreads();
  }
  if (threadIdx.x == 0) work.open[worker] = left.open;
}

template <class T, class Block>
cudaError_t launch_latent_split(const DecodeAttentionParams& params, const KeyTransformParams& transform,
                                const DecodeWorkspace& work, cudaStream_t stream) {
  const auto kernel = latent_split_kernel<T, Block>;
  const void* const address = reinterpret_cast<const void*>(kernel);
  bool sm_90 = false;
  if (const cudaError_t err = compiled_for_sm_90(address, &sm_90); err != cudaSuccess) return err;
  const size_t bytes = Block::bytes(transform.dim, params.group_size);
  if (const cudaError_t err = allow_shared_memory(address, bytes); err != cudaSuccess) return err;
  return launch_dependent(kernel, sm_90, dim3(static_cast<unsigned>(work.workers)), Block::kThreads, bytes, stream,
                          params, work, transform);
}

/// The block that suits the call.
template <class T>
cudaError_t launch_half_latents(const DecodeAttentionParams& params, const KeyTransformParams& transform,
                                const DecodeWorkspace& work, cudaStream_t stream) {
  DeviceInfo info;
  if (const cudaError_t err = device_info(&info); err != cudaSuccess) return err;
  const LatentTile tile =
      attention_tile(params.key_dim, params.value_dim, params.group_size, transform.dim, info.smem_per_block);
  if (tile != LatentTile::long_rows) {
    return with_latent_shape(tile, [&]<class Shape>(Shape) {
      return launch_latent_split<T, LatentBlock<T, Shape>>(params, transform, work, stream);
    });
  }
  if (WarpgroupBlock<T>::takes(params, transform)) {
    const void* const kernel = reinterpret_cast<const void*>(latent_split_kernel<T, WarpgroupBlock<T>>);
    bool sm_90 = false;
    if (const cudaError_t err = compiled_for_sm_90(kernel, &sm_90); err != cudaSuccess) return err;
    if (sm_90) return launch_latent_split<T, WarpgroupBlock<T>>(params, transform, work, stream);
  }
  using Block = LatentBlock<T, LatentShapeOf<LatentTile::long_rows>::type>;
  return launch_latent_split<T, Block>(params, transform, work, stream);
}

}  // namespace uncomp::kernels
