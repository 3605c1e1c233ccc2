// SPDX-License-Identifier: Apache-2.0
// The half-precision kernel: a block owns 64 packed queries of one row (core/query_tiles.h), a warp 16 of them, and
// streams the keys in tiles of 64. One buffer for keys and one for values: values arrive while scores are computed,
// the next keys while values are summed up.
#pragma once

#include "kernels/common/mma.cuh"
#include "kernels/common/swizzle.cuh"
#include "kernels/ragged_attention/finish.cuh"
#include "kernels/ragged_attention/launch.h"
#include "kernels/ragged_attention/rows.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {

inline constexpr int kTileThreads = 128;
static_assert(kQueryTile == 16 * (kTileThreads / 32) && kKeyTile == 64);

template <class T, int kTile>
struct alignas(16) TileShared {
  T query[kQueryTile * kTile];
  T key[kKeyTile * kTile];
  T value[kKeyTile * kTile];
};
static_assert(sizeof(TileShared<__half, 256>) <= 99 * 1024, "one block must fit everywhere");

/// 64 packed queries into shared memory; what is not real becomes zero. Any alignment: read once a block.
template <class T, int kTile>
__device__ __forceinline__ void load_queries(T* shared, const RaggedAttentionParams& params, const QueryRow& row,
                                             int32_t m_begin) {
  const Strides3& strides = params.query_strides;
  const T* base = static_cast<const T*>(params.query) + row.sequence * strides.batch;
  const bool vectors = reinterpret_cast<uintptr_t>(params.query) % 16 == 0 && strides.batch % 8 == 0 &&
                       strides.head % 8 == 0 && strides.token % 8 == 0;
  for (int i = threadIdx.x; i < kQueryTile * kTile / 8; i += kTileThreads) {
    const int m = i / (kTile / 8), chunk = i % (kTile / 8);
    const int32_t token = (m_begin + m) / params.group_size, head = (m_begin + m) % params.group_size;
    Vec16<T> x;
    reinterpret_cast<uint4&>(x) = make_uint4(0, 0, 0, 0);
    if (row.valid(token) && chunk * 8 < params.key_dim) {
      const T* from = base + (row.first_head + head) * strides.head + token * strides.token + chunk * 8;
      if (vectors) {
        x = load16(from);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) x.data[j] = from[j];
      }
    }
    store16(shared + swizzled<kTile>(m, chunk), x);
  }
}

/// Rows 0 .. live - 1 of [.., dim] into shared memory; the rest of the 64 rows and spare channels become zero.
template <class T, int kTile>
__device__ __forceinline__ void copy_keys(T* shared, const T* base, int64_t stride, int live, int dim) {
  constexpr int kChunks = kTile / 8, kStep = kTileThreads / kChunks;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll
  for (int j = 0; j < kKeyTile / kStep; ++j) {
    const int r = threadIdx.x / kChunks + j * kStep;
    const bool here = r < live && chunk * 8 < dim;
    cp_async16(shared + swizzled<kTile>(r, chunk), here ? base + r * stride + chunk * 8 : base, here);
  }
  cp_async_commit();
}

template <class T, int kTile>
__global__ void __launch_bounds__(kTileThreads, kTile <= 128 ? 3 : 2)
    tiles_kernel(const __grid_constant__ RaggedAttentionParams params, const __grid_constant__ RaggedWorkspace work,
                 int32_t tiles_of_row) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<TileShared<T, kTile>*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Later tokens see more keys, so their tiles go first.
  const int32_t m_begin = (tiles_of_row - 1 - static_cast<int32_t>(blockIdx.x) % tiles_of_row) * kQueryTile;
  const QueryRow row = query_row(params, static_cast<int32_t>(blockIdx.x) / tiles_of_row);
  const int32_t group = params.group_size, seq_len = params.tokens.seq_len, value_dim = params.value_dim;
  const QueryTilePlan plan =
      plan_query_tile(m_begin, group, seq_len, row.first, row.count, params.rows.len(row.row), params.key != nullptr);
  const int32_t tile_begin = part_begin(plan.tiles, blockIdx.y, work.parts);
  const int32_t tile_end = part_begin(plan.tiles, blockIdx.y + 1, work.parts);

  // This thread's two packed queries.
  int32_t token[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) token[i] = (m_begin + warp * 16 + lane / 4 + 8 * i) / group;

  const int64_t slot = params.rows.start(row.row);
  const int32_t kv_head = row.row % params.rows_per_sequence / params.rows_per_kv_head;
  const auto copy = [&](T* target, int32_t tile, const void* past, const void* fresh, const Strides3& strides,
                        int dim) {
    const KeyTile keys = plan.at(tile);
    const T* base = static_cast<const T*>(past) + (slot + keys.begin) * dim;
    int64_t stride = dim;
    if (keys.is_new) {
      stride = strides.token;
      base = static_cast<const T*>(fresh) + row.sequence * strides.batch + kv_head * strides.head +
             (row.first + keys.begin) * stride;
    }
    copy_keys<T, kTile>(target, base, stride, keys.live, dim);
  };

  float out[kTile / 8][4] = {};  // rows lane / 4 and + 8, channels 8 * n + 2 * (lane % 4) and the next
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  const float scale_log2 = params.scale * kLog2E;

  if (tile_begin < tile_end) {
    load_queries<T, kTile>(shared.query, params, row, m_begin);
    copy(shared.key, tile_begin, params.key_rows, params.key, params.key_strides, params.key_dim);
  }
  for (int32_t tile = tile_begin; tile < tile_end; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // keys are here; all warps are done with the values of the tile before
    copy(shared.value, tile, params.value_rows, params.value, params.value_strides, value_dim);

    // Scores [16 queries, 64 keys].
    float score[kKeyTile / 8][4] = {};
    constexpr int kUnroll = kTile <= 64 ? 4 : 2;  // all steps at once would not leave enough registers
#pragma unroll kUnroll
    for (int k = 0; k < kTile / 16; ++k) {
      uint32_t a[4];
      ldmatrix_x4(a, shared.query + swizzled<kTile>(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < kKeyTile / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, shared.key + swizzled<kTile>(16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_16x8x16<T>(score[2 * n], a, low);
        mma_16x8x16<T>(score[2 * n + 1], a, high);
      }
    }

    // Running softmax; what a query does not see becomes -inf.
    const KeyTile keys = plan.at(tile);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t seen = visible_keys(keys, token[i], row.first);
      float best = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeyTile / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& s = score[n][2 * i + j];
          s = 8 * n + 2 * (lane % 4) + j < seen ? s * scale_log2 : -INFINITY;
          best = fmaxf(best, s);
        }
      }
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
      best = fmaxf(best, top[i]);
      const float base = finite_or_zero(best), shrink = exp2f(top[i] - base);
      top[i] = best;
      float tile_sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeyTile / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& s = score[n][2 * i + j];
          s = exp2f(s - base);
          tile_sum += s;
        }
      }
      sum[i] = sum[i] * shrink + tile_sum;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        out[n][2 * i] *= shrink;
        out[n][2 * i + 1] *= shrink;
      }
    }

    // The weights, rounded; their registers are already in the order of the next product's operand.
    uint32_t weight[kKeyTile / 16][4];
#pragma unroll
    for (int k = 0; k < kKeyTile / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[k][i] = pack2<T>(score[2 * k + i / 2][2 * (i % 2)], score[2 * k + i / 2][2 * (i % 2) + 1]);
      }
    }

    cp_async_wait<0>();
    __syncthreads();  // values are here; all warps are done with the keys
    if (tile + 1 < tile_end) {
      copy(shared.key, tile + 1, params.key_rows, params.key, params.key_strides, params.key_dim);
    }

    // out [16 queries, channels] += weights * values.
#pragma unroll
    for (int k = 0; k < kKeyTile / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kTile / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, shared.value + swizzled<kTile>(16 * k + lane % 16, 2 * n + lane / 16));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_16x8x16<T>(out[2 * n], weight[k], low);
        mma_16x8x16<T>(out[2 * n + 1], weight[k], high);
      }
    }
  }

  // A lane holds a quarter of each sum; the results are written as two channels at a time.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (token[i] >= seq_len) continue;
    const int32_t head = row.first_head + (m_begin + warp * 16 + lane / 4 + 8 * i) - token[i] * group;
    const bool valid = row.valid(token[i]);
    const int64_t query =
        (static_cast<int64_t>(row.sequence) * params.rows_per_sequence * group + head) * seq_len + token[i];
    if (work.parts > 1) {
      if (!valid) continue;
      const int64_t place = blockIdx.y * query_count(params) + query;
      if (lane % 4 == 0) work.state[place] = make_float2(top[i], sum[i]);
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        const int channel = 8 * n + 2 * (lane % 4);
        if (channel < value_dim) {
          *reinterpret_cast<float2*>(work.out + place * value_dim + channel) =
              make_float2(out[n][2 * i], out[n][2 * i + 1]);
        }
      }
      continue;
    }
    QueryFinish finish{0.0f, 0.0f, -INFINITY, 0};
    if (valid) finish = finish_query(params, row.sequence, head, token[i], top[i], sum[i]);
    if (lane % 4 == 0) params.lse[query] = finish.lse;
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
      const int channel = 8 * n + 2 * (lane % 4);
      if (channel < value_dim) {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(params.out) + query * value_dim + channel) =
            pack2<T>(finish_channel<T>(params, finish, channel, out[n][2 * i]),
                     finish_channel<T>(params, finish, channel + 1, out[n][2 * i + 1]));
      }
    }
  }
}

template <class T, int kTile>
cudaError_t launch_tiles(const RaggedAttentionParams& params, const RaggedWorkspace& work, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(TileShared<T, kTile>);
  const auto kernel = tiles_kernel<T, kTile>;
  if (const cudaError_t err = allow_shared_memory(reinterpret_cast<const void*>(kernel), kBytes); err != cudaSuccess) {
    return err;
  }
  const int64_t tiles = tiles_per_row(params), blocks = tiles * params.rows.num_rows;
  if (!fits<int32_t>(blocks)) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks), work.parts);
  kernel<<<grid, kTileThreads, kBytes, stream>>>(params, work, static_cast<int32_t>(tiles));
  return cudaGetLastError();
}

/// Picks the smallest tile that holds both head dims.
template <class T>
cudaError_t launch_ragged_half(const RaggedAttentionParams& params, const RaggedWorkspace& work, cudaStream_t stream) {
  const int32_t dim = max_of(params.key_dim, params.value_dim);
  if (dim <= 64) return launch_tiles<T, 64>(params, work, stream);
  if (dim <= 128) return launch_tiles<T, 128>(params, work, stream);
  return launch_tiles<T, 256>(params, work, stream);
}

}  // namespace uncomp::kernels
