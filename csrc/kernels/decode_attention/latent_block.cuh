// SPDX-License-Identifier: Apache-2.0
// A block that attends over latents, as the kernels of decode_attention and decode_evict_ use it:
//
//   LatentBlock<T, Shape> block(memory, transform, rank);
//   block.attend({kv_head, query, ...}, ...) or block.attend_new(...)   // all threads may read the result
//   merge_warps(block.shared, head, channel)
//   __syncthreads();                                      // before the next call
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/decode_attention/latent_slice.cuh"

namespace uncomp::kernels {

/// Whose keys are made, and the queries that meet them.
template <class T>
struct LatentQuery {
  int kv_head;
  const T* query;
  int64_t head_stride;
  int heads;
  int64_t sequence;
};

template <class T, class Shape>
struct LatentBlock {
  using Shared = LatentShared<T, Shape>;
  static constexpr int kWarps = Shape::kWarps, kThreads = Shape::kThreads, kBlocks = Shape::kBlocks;

  Shared& shared;
  const KeyTransformParams& transform;
  LatentTables<T> tables;
  int rank, loaded = -1;  // KV head of the tables
  bool filled = false;    // the table of turns

  __device__ __forceinline__ LatentBlock(void* memory, const KeyTransformParams& transform, int rank)
      : shared(*static_cast<Shared*>(memory)),
        transform(transform),
        tables(LatentTables<T>::in(&shared, transform.dim)),
        rank(rank) {}

  static size_t bytes(int dim, int heads) { return latent_shared_bytes<T, Shape>(dim, heads); }

  /// Slots `slot` to `slot` + count - 1 of an arena; see attend_slice.
  template <class OnScore = NoScores>
  __device__ __forceinline__ void attend(const LatentQuery<T>& q, const T* key_rows, const T* value_rows, int64_t slot,
                                         int count, int value_dim, float scale_log2, OnScore on_score = {}) {
    const LatentInFlight<T, Shape> fetched = start(q);
    const int dim = transform.dim;
    attend_latents(shared, tables, dim, latent_row(transform, slot, q.sequence), key_rows + slot * rank,
                   value_rows + slot * value_dim, count, rank, value_dim, q.heads, scale_log2 * logit_factor(transform),
                   on_score, [&](bool by_table) {
                     fetched.store(tables, dim);
                     if constexpr (Shape::kSpan > 0) {
                       if (by_table && !filled) {
                         __syncthreads();
                         fill_turns<T, Shape::kSpan / 16, kThreads>(tables.turns, tables.turn, dim);
                         filled = true;
                       }
                     }
                     cp_async_wait<2 * Shape::kStages>();  // the basis has landed, behind it come the rings
                     __syncthreads();
                   });
  }

  /// Logits of one new token: on_score(head, logit in log2 units), once for each of `heads`.
  template <class OnScore>
  __device__ __forceinline__ void attend_new(const LatentQuery<T>& q, const T* latent, int32_t position,
                                             float scale_log2, OnScore on_score) {
    constexpr int kMine = (256 + kThreads - 1) / kThreads;  // places of a thread
    __shared__ float scratch[Shape::kWarps];
    const int dim = transform.dim, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    start(q).store(tables, dim);
    cp_async_wait<0>();
    __syncthreads();
    float squares = 0.0f;
    for (int place = threadIdx.x; place < dim; place += kThreads) {
      float key = tables.bias[place / 2 * 4 + place % 2];
#pragma unroll 16
      for (int k = 0; k < rank; ++k) key += to_float(latent[k]) * to_float(tables.basis[k * tables.stride + place]);
      squares += key * key;
      tables.key[place] = weighs_channels(transform) ? key * tables.weight[place] : key;
    }
    const float total = block_sum(squares, scratch);  // a barrier inside: all places are written
    const float norm = transform.norm == nullptr ? 1.0f : rsqrtf(total / static_cast<float>(dim) + transform.norm_eps);
    const uint32_t at = static_cast<uint32_t>(position) + static_cast<uint32_t>(position_offset(transform, q.sequence));
    float turned[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int place = threadIdx.x + i * kThreads;
      if (place >= dim) break;
      const float2 by = cos_sin(at, tables.turn[place / 16 * 8 + place % 8]);
      const float partner = tables.key[place ^ 8];
      turned[i] = tables.key[place] * by.x + (place % 16 < 8 ? -partner : partner) * by.y;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int place = threadIdx.x + i * kThreads;
      if (place < dim) tables.key[place] = turned[i];
    }
    __syncthreads();
    for (int head = warp; head < q.heads; head += Shape::kWarps) {
      float dot = 0.0f;
      for (int place = lane; place < dim; place += 32) {
        dot += to_float(tables.query[head * tables.stride + place]) * tables.key[place];
      }
      dot = warp_sum(dot);
      if (lane == 0) on_score(head, dot * norm * scale_log2 * logit_factor(transform));
    }
  }

 private:
  __device__ __forceinline__ LatentInFlight<T, Shape> start(const LatentQuery<T>& q) {
    if (q.kv_head != loaded) load_basis<Shape>(tables, transform, q.kv_head, rank);
    cp_async_commit();
    loaded = q.kv_head;
    return LatentInFlight<T, Shape>(transform, q.kv_head, q.query, q.head_stride, q.heads);
  }
};

}  // namespace uncomp::kernels
