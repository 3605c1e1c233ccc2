// SPDX-License-Identifier: Apache-2.0
// Pass 1: log-sum-exp of each window query over one run of keys. Queries are matrix rows, so a thread reduces over
// its own accumulators; the state of its (query, quarter of keys) waits in shared memory between tiles.
#pragma once

#include "kernels/window_scores/passes.h"
#include "kernels/window_scores/tile.cuh"

namespace uncomp::kernels {

template <class T, int kTile>
__global__ void __launch_bounds__(kWindowThreads, 4) lse_pass_kernel(const __grid_constant__ LsePass pass) {
  using Tile = Tile<T, kTile>;
  const WindowScoresParams& p = pass.params;
  const RowRun run = pass.runs.at(blockIdx.x);
  if (run.row < 0) return;
  const int32_t n = p.rows.count(run.row), end = min_of(run.first + pass.runs.run, n);
  if (run.first >= end) return;

  const int32_t all = p.group_size * p.window, q_first = blockIdx.y * Tile::kMaxQueries;
  const int32_t count = min_of(Tile::kMaxQueries, all - q_first), tiles = ceil_div(count, 16);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  extern __shared__ __align__(128) unsigned char shared[];
  T* queries = reinterpret_cast<T*>(shared);
  T* buffer = queries + tiles * 16 * kTile + warp * Tile::kKeys * kTile;
  // [tiles * 2][threads]: queries lane / 4 and lane / 4 + 8 of each tile.
  LogSum* state = reinterpret_cast<LogSum*>(shared + tiles * 16 * kTile * sizeof(T) + Tile::kKeyBytes);

  const int32_t sequence = run.row / p.rows.rows_per_sequence;
  const int32_t head0 = (run.row % p.rows.rows_per_sequence) * p.group_size;
  const T* query = static_cast<const T*>(p.query) + sequence * p.query_stride.batch;
  Tile::copy_queries(queries, tiles * 16, query, p.head_dim, [&](int32_t q) -> const T* {
    if (q >= count) return nullptr;
    const int32_t head = (q_first + q) / p.window, i = (q_first + q) % p.window;
    if (newest_visible(n, p.window, i) < 0) return nullptr;
    return query + (head0 + head) * p.query_stride.head + i * p.query_stride.token;
  });
  cp_async_commit();
  const T* row = static_cast<const T*>(p.key) + p.rows.offset(run.row, p.key_stride);
  int32_t first = run.first + warp * Tile::kKeys;
  Tile::copy_keys(buffer, row, p.key_stride.token, first, end, p.head_dim);
  cp_async_commit();
  for (int32_t t = 0; t < 2 * tiles; ++t) state[t * kWindowThreads + threadIdx.x] = {-kInf, 0.0f};
  cp_async_wait<1>();
  __syncthreads();

  const float factor = p.scale * kLog2e;
  for (; first < end; first += kWindowWarps * Tile::kKeys) {
    cp_async_wait<0>();
    __syncwarp();
    typename Tile::Keys keys;
    Tile::load_keys(keys, buffer);
    __syncwarp();
    const int32_t next = first + kWindowWarps * Tile::kKeys;
    if (next < end) Tile::copy_keys(buffer, row, p.key_stride.token, next, end, p.head_dim);
    cp_async_commit();

    // Only the last W columns, and what lies behind the last token, need a mask.
    const bool masked = first + Tile::kKeys - 1 > newest_visible(n, p.window, 0);
    for (int32_t t = 0; t < tiles; ++t) {
      float x[2 * Tile::kKeyTiles][4];
      Tile::queries_times_keys(x, queries, 16 * t, keys);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int32_t newest = 0;
        if (masked) newest = newest_visible(n, p.window, (q_first + 16 * t + 8 * half + lane / 4) % p.window);
        LogSum& seen = state[(2 * t + half) * kWindowThreads + threadIdx.x];
        LogSum now = seen;
        float largest = now.max;
#pragma unroll
        for (int c = 0; c < 2 * Tile::kKeyTiles; ++c) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& logit = x[c][2 * half + e];
            logit *= factor;
            if (masked && first + 8 * c + 2 * (lane % 4) + e > newest) logit = -kInf;
            largest = fmaxf(largest, logit);
          }
        }
        const float zero = largest == -kInf ? 0.0f : largest;
        float total = now.total * exp2_fast(now.max - zero);
#pragma unroll
        for (int c = 0; c < 2 * Tile::kKeyTiles; ++c) {
          total += exp2_fast(x[c][2 * half] - zero) + exp2_fast(x[c][2 * half + 1] - zero);
        }
        seen = {largest, total};
      }
    }
  }

  // A query's sixteen states (warp, lane % 4) become the partial result of this run.
  cp_async_wait<0>();
  __syncthreads();
  for (int32_t q = threadIdx.x; q < count; q += kWindowThreads) {
    LogSum joint{-kInf, 0.0f};
    const LogSum* of_query = state + (q / 8) * kWindowThreads + q % 8 * 4;
    for (int w = 0; w < kWindowWarps; ++w) {
      for (int l = 0; l < 4; ++l) joint.join(of_query[32 * w + l]);
    }
    pass.partial[static_cast<int64_t>(blockIdx.x) * all + q_first + q] = make_float2(joint.max, joint.total);
  }
}

}  // namespace uncomp::kernels
