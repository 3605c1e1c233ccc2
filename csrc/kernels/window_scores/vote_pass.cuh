// SPDX-License-Identifier: Apache-2.0
// Votes of a packed arena: keys are matrix rows, and the tiles of one query's heads follow each other, so that a
// thread reduces over heads in registers and then rounds.
#pragma once

#include "core/votes.h"
#include "kernels/window_scores/passes.h"
#include "kernels/window_scores/tile.cuh"

namespace uncomp::kernels {

inline constexpr int kMaxVoteQueries = 128;

/// What does not depend on the products: order of live slots, zeros in dead ones, the step counter.
__device__ __forceinline__ void write_fixed_state(const SeedVotesParams& p, const RowRun& run, int32_t run_slots) {
  const RaggedRows& rows = p.rows.arena;
  const int32_t room = rows.room(run.row), len = rows.len(run.row);
  const int64_t start = rows.start(run.row);
  if (run.first == 0 && threadIdx.x == 0) p.vote_step[run.row] = 0;
  for (int32_t i = run.first + threadIdx.x; i < min_of(run.first + run_slots, room); i += blockDim.x) {
    p.order[start + i] = i < len ? i : 0;
    if (i < len) continue;
    p.vote_sum[start + i] = 0;
    for (int32_t v = 0; v < p.vote_window; ++v) p.votes[v * rows.capacity + start + i] = 0;
  }
}

template <class T, int kTile>
__global__ void __launch_bounds__(kWindowThreads, 3) vote_pass_kernel(const __grid_constant__ VotePass pass) {
  using Tile = Tile<T, kTile>;
  constexpr int kSums = 2 * Tile::kKeyTiles;  // keys of a thread: 8 s + lane / 4
  const SeedVotesParams& p = pass.params;
  const RowRun run = pass.runs.at(blockIdx.x);
  if (run.row < 0) return;
  write_fixed_state(p, run, pass.runs.run);
  const int32_t end = min_of(run.first + pass.runs.run, p.rows.count(run.row));
  if (run.first >= end) return;

  const int32_t group = p.group_size, bits = vote_scale_bits(p.vote_window), oldest = p.window - p.vote_window;
  const VoteTiles plan = VoteTiles::of(group, p.vote_window);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __shared__ __align__(8) float lse[kMaxVoteQueries];       // powers of two
  __shared__ __align__(8) int32_t newest[kMaxVoteQueries];  // newest position a packed query sees, -1 for none
  extern __shared__ __align__(128) unsigned char shared[];
  T* buffer = reinterpret_cast<T*>(shared) + warp * Tile::kKeys * kTile;
  T* queries = reinterpret_cast<T*>(shared + Tile::kKeyBytes);

  const int32_t sequence = run.row / p.rows.rows_per_sequence;
  const int32_t head0 = (run.row % p.rows.rows_per_sequence) * group;
  const T* query = static_cast<const T*>(p.query) + sequence * p.query_stride.batch;
  const float* lse_of_heads = p.lse + (static_cast<int64_t>(sequence) * p.num_q_heads + head0) * p.window;
  const int32_t* query_position = p.query_position + static_cast<int64_t>(sequence) * p.window;
  const int64_t start = p.rows.arena.start(run.row), capacity = p.rows.arena.capacity;
  const T* row = static_cast<const T*>(p.key) + start * p.key_stride;
  const float factor = p.scale * kLog2e;
  // A packed query's place in the window, and its head; the place is W or more where there is none.
  const auto place = [&](int32_t q, int32_t chunk, int32_t* head) {
    const int32_t tile = q / kQueryTile;
    *head = tile % group;
    const int32_t vote = (chunk * plan.query_tiles + tile / group) * kQueryTile + q % kQueryTile;
    return vote < p.vote_window && tile / group < plan.tiles_in(chunk) ? oldest + vote : p.window;
  };

  for (int32_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int32_t tiles = plan.tiles_in(chunk) * group, packed = round_up(tiles, 2) * kQueryTile;
    if (chunk > 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    Tile::copy_queries(queries, packed, query, p.head_dim, [&](int32_t q) -> const T* {
      int32_t head;
      const int32_t i = place(q, chunk, &head);
      if (i >= p.window || query_position[i] < 0) return nullptr;
      return query + (head0 + head) * p.query_stride.head + i * p.query_stride.token;
    });
    cp_async_commit();
    int32_t first = run.first + warp * Tile::kKeys;
    Tile::copy_keys(buffer, row, p.key_stride, first, end, p.head_dim);
    cp_async_commit();
    for (int32_t q = threadIdx.x; q < packed; q += kWindowThreads) {
      int32_t head;
      const int32_t i = place(q, chunk, &head);
      const bool live = i < p.window && query_position[i] >= 0;
      lse[q] = live ? lse_of_heads[static_cast<int64_t>(head) * p.window + i] * kLog2e : 0.0f;
      newest[q] = live ? query_position[i] : -1;
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
      if (next < end) Tile::copy_keys(buffer, row, p.key_stride, next, end, p.head_dim);
      cp_async_commit();

      int32_t position[kSums], total[kSums];
      float weight[kSums][2];
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        const int32_t slot = first + 8 * s + lane / 4;
        position[s] = slot < end ? p.slot_position[start + slot] : 0;
        total[s] = 0;
        weight[s][0] = weight[s][1] = 0.0f;
      }
      int32_t head = 0, vote = chunk * plan.query_tiles * kQueryTile + 2 * (lane % 4);
#pragma unroll 1
      for (int32_t t = 0; t < tiles; t += 2) {
        float product[2][Tile::kKeyTiles][4];
        Tile::keys_times_queries(product, queries, t * kQueryTile, keys);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (t + h >= tiles) break;
          const int32_t q = (t + h) * kQueryTile + 2 * (lane % 4);
#pragma unroll
          for (int s = 0; s < kSums; ++s) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float logit = fmaf(product[h][s / 2][s % 2 * 2 + e], factor, -lse[q + e]);
              const bool sees = newest[q + e] >= 0 && position[s] <= newest[q + e];
              const float now = sees ? exp2_fast(logit) : 0.0f;
              weight[s][e] = p.reduce_group == Reduce::max ? max_or_nan(weight[s][e], now) : weight[s][e] + now;
            }
          }
          if (++head < group) continue;
          head = 0;
          const float share = p.reduce_group == Reduce::max ? 1.0f : static_cast<float>(group);
#pragma unroll
          for (int s = 0; s < kSums; ++s) {
            const int32_t slot = first + 8 * s + lane / 4;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int32_t value = quantize_vote(weight[s][e] / share, bits);
              weight[s][e] = 0.0f;
              if (vote + e >= p.vote_window) continue;
              total[s] += value;
              if (slot < end) p.votes[(vote + e) * capacity + start + slot] = value;
            }
          }
          vote += kQueryTile;
        }
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        const int32_t slot = first + 8 * s + lane / 4, sum = quad_sum(total[s]);
        if (lane % 4 != 0 || slot >= end) continue;
        p.vote_sum[start + slot] = chunk > 0 ? p.vote_sum[start + slot] + sum : sum;
      }
    }
  }
}

}  // namespace uncomp::kernels
