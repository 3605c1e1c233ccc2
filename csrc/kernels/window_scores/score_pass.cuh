// SPDX-License-Identifier: Apache-2.0
// Pass 2: the mass of each key. Keys are matrix rows, so the sum over the window is a sum over a thread's own
// accumulator columns; a column of scores is written by one lane alone.
#pragma once

#include "kernels/window_scores/passes.h"
#include "kernels/window_scores/tile.cuh"

namespace uncomp::kernels {

template <class T, int kTile>
__global__ void __launch_bounds__(kWindowThreads, 3) score_pass_kernel(const __grid_constant__ ScorePass pass) {
  using Tile = Tile<T, kTile>;
  constexpr int kSums = 2 * Tile::kKeyTiles;  // keys of a thread: 8 s + lane / 4
  const WindowScoresParams& p = pass.params;
  const int32_t runs = ceil_div(p.width, pass.run), row_index = blockIdx.x / runs;
  const int32_t begin = blockIdx.x % runs * pass.run, n = p.rows.count(row_index);
  const int32_t stop = min_of(begin + pass.run, p.width), end = min_of(stop, n);
  const bool per_head = p.reduce_group == Reduce::none;
  float* scores = p.scores + static_cast<int64_t>(row_index) * (per_head ? p.group_size : 1) * p.width;

  // Columns behind the last token.
  for (int32_t h = 0; h < (per_head ? p.group_size : 1); ++h) {
    for (int32_t j = max_of(begin, n) + threadIdx.x; j < stop; j += kWindowThreads) {
      scores[static_cast<int64_t>(h) * p.width + j] = 0.0f;
    }
  }
  if (begin >= end) return;

  const HeadTiles heads = HeadTiles::of(p.group_size, p.window, Tile::kMaxQueries);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __shared__ __align__(8) float lse[Tile::kMaxQueries];       // powers of two
  __shared__ __align__(8) int32_t newest[Tile::kMaxQueries];  // newest key a packed query sees, -1 for none
  extern __shared__ __align__(128) unsigned char shared[];
  T* buffer = reinterpret_cast<T*>(shared) + warp * Tile::kKeys * kTile;
  T* queries = reinterpret_cast<T*>(shared + Tile::kKeyBytes);

  const int32_t sequence = row_index / p.rows.rows_per_sequence;
  const int32_t head0 = (row_index % p.rows.rows_per_sequence) * p.group_size;
  const T* query = static_cast<const T*>(p.query) + sequence * p.query_stride.batch;
  const float* lse_of_heads = p.lse + (static_cast<int64_t>(sequence) * p.num_q_heads + head0) * p.window;
  const T* row = static_cast<const T*>(p.key) + p.rows.offset(row_index, p.key_stride);

  const float factor = p.scale * kLog2e;
  float share = p.reduce_group == Reduce::mean ? 1.0f / static_cast<float>(p.group_size) : 1.0f;
  if (p.reduce_window == Reduce::mean) share /= static_cast<float>(min_of(p.window, n));
  // The column that this lane writes: its quarter of the quad picks one of the sums.
  const int32_t own_key = 8 * (lane % 4) + lane / 4;
  const auto own = [&](const float(&sums)[kSums]) {
    float mine = sums[0];
#pragma unroll
    for (int s = 1; s < kSums; ++s) mine = lane % 4 == s ? sums[s] : mine;
    return mine;
  };

  for (int32_t chunk = 0; chunk < heads.chunks; ++chunk) {
    const int32_t chunk_head = chunk * heads.heads_per_chunk, chunk_heads = heads.heads_in(chunk, p.group_size);
    const int32_t tiles = chunk_heads * heads.tiles_per_head, packed = round_up(tiles, 2) * kQueryTile;
    if (chunk > 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    const int32_t per_head_queries = heads.tiles_per_head * kQueryTile;
    Tile::copy_queries(queries, packed, query, p.head_dim, [&](int32_t q) -> const T* {
      const int32_t h = q / per_head_queries, i = q % per_head_queries;
      if (h >= chunk_heads || i >= p.window || newest_visible(n, p.window, i) < 0) return nullptr;
      return query + (head0 + chunk_head + h) * p.query_stride.head + i * p.query_stride.token;
    });
    cp_async_commit();
    int32_t first = begin + warp * Tile::kKeys;
    Tile::copy_keys(buffer, row, p.key_stride.token, first, end, p.head_dim);
    cp_async_commit();
    for (int32_t q = threadIdx.x; q < packed; q += kWindowThreads) {
      const int32_t h = q / per_head_queries, i = q % per_head_queries;
      const bool live = h < chunk_heads && i < p.window && newest_visible(n, p.window, i) >= 0;
      lse[q] = live ? lse_of_heads[static_cast<int64_t>(chunk_head + h) * p.window + i] * kLog2e : 0.0f;
      newest[q] = live ? newest_visible(n, p.window, i) : -1;
    }
    cp_async_wait<1>();
    __syncthreads();

    for (; first < end; first += kWindowWarps * Tile::kKeys) {
      cp_async_wait<0>();
      __syncwarp();
      typename Tile::Keys keys;
      Tile::load_keys(keys, buffer);
      __syncwarp();
      const int32_t next = first + kWindowWarps * Tile::kKeys;
      if (next < end) Tile::copy_keys(buffer, row, p.key_stride.token, next, end, p.head_dim);
      cp_async_commit();

      const bool masked = p.window % kQueryTile != 0 || first + Tile::kKeys - 1 > newest_visible(n, p.window, 0);
      const int32_t column = first + own_key;
      const bool writes = lane % 4 < kSums && column < end;
      float sums[kSums], best[kSums];
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s] = best[s] = 0.0f;
      int32_t tile_of_head = 0, head = 0;
#pragma unroll 1
      for (int32_t t = 0; t < tiles; t += 2) {
        float product[2][Tile::kKeyTiles][4];
        Tile::keys_times_queries(product, queries, t * kQueryTile, keys);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (t + h >= tiles) break;
          const int32_t q = (t + h) * kQueryTile + 2 * (lane % 4);
          const float2 of_query = *reinterpret_cast<const float2*>(lse + q);
          const int2 newest_key = masked ? *reinterpret_cast<const int2*>(newest + q) : make_int2(0, 0);
#pragma unroll
          for (int s = 0; s < kSums; ++s) {
            const float* x = &product[h][s / 2][s % 2 * 2];
            float even = exp2_fast(fmaf(x[0], factor, -of_query.x)), odd = exp2_fast(fmaf(x[1], factor, -of_query.y));
            if (masked) {
              const int32_t key = first + 8 * s + lane / 4;
              even = key <= newest_key.x ? even : 0.0f;
              odd = key <= newest_key.y ? odd : 0.0f;
            }
            sums[s] += even + odd;
          }
          if (++tile_of_head < heads.tiles_per_head) continue;
          tile_of_head = 0;
          // A head is complete. Sums over heads need nothing here; the others need this head's mass alone.
          if (per_head || p.reduce_group == Reduce::max) {
            float mass[kSums];
#pragma unroll
            for (int s = 0; s < kSums; ++s) {
              mass[s] = quad_sum(sums[s]);
              best[s] = max_or_nan(best[s], mass[s]);
              sums[s] = 0.0f;
            }
            if (per_head && writes) {
              scores[static_cast<int64_t>(chunk_head + head) * p.width + column] = own(mass) * share;
            }
          }
          ++head;
        }
      }
      if (!per_head) {
        if (p.reduce_group != Reduce::max) {
#pragma unroll
          for (int s = 0; s < kSums; ++s) best[s] = quad_sum(sums[s]);
        }
        float result = own(best) * share;
        if (writes) {
          if (chunk > 0) result = join_chunks(p.reduce_group, scores[column], result);
          scores[column] = result;
        }
      }
    }
  }
}

}  // namespace uncomp::kernels
