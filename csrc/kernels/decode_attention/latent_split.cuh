// SPDX-License-Identifier: Apache-2.0
// The split kernel over latents (latent_block.cuh); shares and parts are those of split.cuh.
#pragma once

#include "kernels/decode_attention/latent_block.cuh"
#include "kernels/decode_attention/split.cuh"

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

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    latent_split_kernel(const __grid_constant__ DecodeAttentionParams params,
                        const __grid_constant__ DecodeWorkspace work,
                        const __grid_constant__ KeyTransformParams transform) {
  extern __shared__ __align__(128) unsigned char memory[];
  LatentBlock<T, Shape> block(memory, transform, params.key_dim);
  const int32_t worker = blockIdx.x, heads = params.group_size;
  const RaggedRows& rows = params.rows;
  wait_for_previous();
  let_next_start();

  const WorkerShare share = find_share<Shape::kWarps>(rows, worker, work.workers);
  OpenRow open{-1, -1};
  for (SplitWalk walk(worker, share.quota, share.total, share.cursor); !walk.done();) {
    const RowPiece piece = walk.next(rows);
    const int32_t sequence = piece.row / params.rows_per_sequence, in_sequence = piece.row % params.rows_per_sequence;
    const LatentQuery<T> query{in_sequence / transform.rows_per_kv,
                               static_cast<const T*>(params.query) + sequence * params.query_batch_stride +
                                   in_sequence * heads * params.query_head_stride,
                               params.query_head_stride, heads, sequence};
    block.attend(query, static_cast<const T*>(params.key_rows), static_cast<const T*>(params.value_rows),
                 rows.start(piece.row) + piece.slot_begin, piece.slot_end - piece.slot_begin, params.value_dim,
                 params.scale * kLog2E);
    store_piece<T>(block.shared, params, work, worker, piece);
    if (piece.starts && !piece.ends) {
      open = {piece.row, static_cast<int32_t>(walk.last_block()) / static_cast<int32_t>(share.quota)};
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) work.open[worker] = open;
}

template <class T, class Shape>
cudaError_t launch_latent_split(const DecodeAttentionParams& params, const KeyTransformParams& transform,
                                const DecodeWorkspace& work, cudaStream_t stream) {
  const auto kernel = latent_split_kernel<T, Shape>;
  const void* const address = reinterpret_cast<const void*>(kernel);
  bool sm_90 = false;
  if (const cudaError_t err = compiled_for_sm_90(address, &sm_90); err != cudaSuccess) return err;
  const size_t bytes = LatentBlock<T, Shape>::bytes(transform.dim);
  if (const cudaError_t err = allow_shared_memory(address, bytes); err != cudaSuccess) return err;
  return launch_dependent(kernel, sm_90, dim3(static_cast<unsigned>(work.workers)), Shape::kThreads, bytes, stream,
                          params, work, transform);
}

}  // namespace uncomp::kernels
