// SPDX-License-Identifier: Apache-2.0
// Pass 2 on sm_90a: the mass of each key. The same runs as pass 1, last tile first: what pass 1 read last is still in
// L2. A warp sums its 16 queries over the lanes that hold them; one more warp adds up the warps of a team and writes.
#pragma once

#include "kernels/window_scores/stream.cuh"

namespace uncomp::kernels {

/// Where the sums of a warp's queries wait for the finishing warp: lines of one number a key.
template <int kTile>
struct TileSums {
  static constexpr int kPlaces = 8;  // at most
  static constexpr int kLines = 32;  // of all places
  static constexpr size_t kBytes = size_t{kLines} * stream_keys(kTile) * sizeof(float);
};

#if UNCOMP_SM90A

/// Adds the other half of the lanes' sums: lanes with bit kOffset keep the upper half of kCount columns.
template <int kOffset, int kCount, int kColumns>
__device__ __forceinline__ void halve_sums(float (&v)[kColumns][2]) {
  constexpr int kHalf = kCount / 2;
  if constexpr (kHalf == 0) {
#pragma unroll
    for (int e = 0; e < 2; ++e) v[0][e] += __shfl_xor_sync(0xffffffffu, v[0][e], kOffset);
  } else {
    const bool upper = threadIdx.x & kOffset;
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float keep = upper ? v[j + kHalf][e] : v[j][e], give = upper ? v[j][e] : v[j + kHalf][e];
        v[j][e] = keep + __shfl_xor_sync(0xffffffffu, give, kOffset);
      }
    }
  }
}

/// Sums v over the eight lanes of one lane % 4; v[j][e] is key 8 j + 2 (l % 4) + e. With n columns of 8 keys, lane l is
/// left with v[0 .. n / 8 - 1] of columns l / 4 * n / 8 and on; with 4 columns with column l / 8, twice.
template <int kColumns>
__device__ __forceinline__ void sum_queries(float (&v)[kColumns][2]) {
  halve_sums<16, kColumns>(v);
  halve_sums<8, kColumns / 2>(v);
  halve_sums<4, kColumns / 4>(v);
}

/// Writes what sum_queries left to a line of one float a key.
template <int kColumns>
__device__ __forceinline__ void store_sums(float* line, const float (&v)[kColumns][2]) {
  const int lane = threadIdx.x % 32;
  if constexpr (kColumns == 4) {
    if (lane / 4 % 2 == 0)
      *reinterpret_cast<float2*>(line + 8 * (lane / 8) + 2 * (lane % 4)) = make_float2(v[0][0], v[0][1]);
  } else {
    constexpr int kLeft = kColumns / 8;
#pragma unroll
    for (int j = 0; j < kLeft; ++j) {
      *reinterpret_cast<float2*>(line + 8 * (lane / 4 * kLeft + j) + 2 * (lane % 4)) = make_float2(v[j][0], v[j][1]);
    }
  }
}

/// lse of the chunk's packed queries in powers of two, +inf where there is none: partial results of the row's runs,
/// joined in an order that depends on their number alone. The row's first block writes the result.
template <int kConsumers>
__device__ __forceinline__ void merge_lse(const ScorePass& pass, const StreamPlan& plan, const StreamBlock& block,
                                          int32_t chunk, float2* scratch, float* lse) {
  const WindowScoresParams& p = pass.params;
  const int32_t rows = plan.team * 64, parts = kConsumers / rows;
  const int32_t q = threadIdx.x % rows, part = threadIdx.x / rows;
  const PackedQuery packed = packed_query(plan, p.group_size, p.window, block.tokens, chunk, q);
  if (part < parts) {
    const int32_t all = p.group_size * p.window, splits = ceil_div(block.tokens, pass.runs.run);
    const float2* partial = pass.partial + pass.runs.first_item(block.row) * all + packed.head * p.window + packed.i;
    LogSum joint{-kInf, 0.0f};
    if (packed.head >= 0) {
#pragma unroll 4
      for (int32_t s = part; s < splits; s += parts) {
        const float2 of_run = partial[static_cast<int64_t>(s) * all];
        joint.join({of_run.x, of_run.y});
      }
    }
    scratch[threadIdx.x] = make_float2(joint.max, joint.total);
  }
  named_barrier<kConsumers>(1);
  if (part == 0) {
    LogSum joint{-kInf, 0.0f};
    for (int32_t s = 0; s < parts; ++s) joint.join({scratch[s * rows + q].x, scratch[s * rows + q].y});
    const float result = joint.max + log2f(joint.total);
    lse[q] = packed.head >= 0 ? result : kInf;
    const int32_t h = plan.head_of(q / kQueryTile);
    if (block.first == 0 && h < plan.heads.heads_in(chunk, p.group_size) && packed.i < p.window) {
      const int64_t head =
          static_cast<int64_t>(block.sequence) * p.num_q_heads + block.head0 + chunk * plan.heads.heads_per_chunk + h;
      p.lse[head * p.window + packed.i] = packed.head >= 0 ? result * kLn2 : -kInf;
    }
  }
  named_barrier<kConsumers>(1);
}

/// The finishing warp: adds the lines of each tile, reduces over heads, writes the scores.
template <int kTile>
__device__ __forceinline__ void finish_stream(const WindowScoresParams& p, const StreamPlan& plan,
                                              const StreamBlock& block, const float* sums, PhaseBarrier* done,
                                              PhaseBarrier* taken) {
  constexpr int kKeys = stream_keys(kTile);
  const int lane = threadIdx.x % 32;
  const bool per_head = p.reduce_group == Reduce::none, separate = per_head || p.reduce_group == Reduce::max;
  float* scores = p.scores + static_cast<int64_t>(block.row) * (per_head ? p.group_size : 1) * p.width;
  float share = p.reduce_group == Reduce::mean ? 1.0f / static_cast<float>(p.group_size) : 1.0f;
  if (p.reduce_window == Reduce::mean) share /= static_cast<float>(min_of(p.window, block.tokens));
  const int32_t end = min_of(block.end, p.width);
  const int32_t log_places = plan.log_places(separate), place_lines = plan.lines_of_place(separate);
  int32_t it = 0;
  for (int32_t chunk = 0; chunk < plan.heads.chunks; ++chunk) {
    const int32_t heads = plan.heads.heads_in(chunk, p.group_size), rows = plan.rows_in(chunk, p.group_size);
    for (int32_t tile = block.tiles - 1; tile >= 0; --tile, ++it) {
      const int32_t slot = it & ((1 << log_places) - 1);
      done[slot].wait(it >> log_places & 1);
      for (int32_t key = 2 * lane; key < kKeys; key += 64) {
        const int32_t column = block.first + tile * kKeys + key;
        const float* lines = sums + slot * place_lines * kKeys + key;
        const auto write = [&](int32_t head, float2 mass, bool join) {
          float* to = scores + static_cast<int64_t>(head) * p.width + column;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (column + e >= end) continue;
            const float now = (e == 0 ? mass.x : mass.y) * share;
            to[e] = join ? join_chunks(p.reduce_group, to[e], now) : now;
          }
        };
        float2 result = make_float2(0.0f, 0.0f);
        if (!separate) {
          for (int32_t line = 0; line < ceil_div(rows, 16); ++line) {
            const float2 sum = *reinterpret_cast<const float2*>(lines + line * kKeys);
            result = make_float2(result.x + sum.x, result.y + sum.y);
          }
        } else {
          for (int32_t h = 0; h < heads; ++h) {
            float2 mass = make_float2(0.0f, 0.0f);
            for (int32_t t = 0; t < plan.heads.tiles_per_head; ++t) {
              const float2 sum = *reinterpret_cast<const float2*>(lines + (h * plan.heads.tiles_per_head + t) * kKeys);
              mass = make_float2(mass.x + sum.x, mass.y + sum.y);
            }
            if (per_head) write(chunk * plan.heads.heads_per_chunk + h, mass, false);
            result = make_float2(max_or_nan(result.x, mass.x), max_or_nan(result.y, mass.y));
          }
        }
        if (!per_head) write(0, result, chunk > 0);
      }
      taken[slot].arrive();
    }
  }
}

#endif

template <class T, int kTile>
__global__ void __launch_bounds__(KeyStream<T, kTile>::kThreads, 1)
    stream_scores_kernel(const __grid_constant__ ScorePass pass) {
#if UNCOMP_SM90A
  using Stream = KeyStream<T, kTile>;
  using Sums = TileSums<kTile>;
  constexpr int kColumns = Stream::kKeys / 8;
  const WindowScoresParams& p = pass.params;
  extern __shared__ __align__(1024) unsigned char ring[];
  float* sums = reinterpret_cast<float*>(ring + Stream::kBytes);
  __shared__ __align__(8) PhaseBarrier full[Stream::kStages], empty[Stream::kStages];
  __shared__ __align__(8) PhaseBarrier done[Sums::kPlaces], taken[Sums::kPlaces];
  __shared__ float2 scratch[Stream::kConsumers];
  __shared__ float lse[64 * Stream::kGroups];

  const StreamPlan& plan = pass.plan;
  fetch_parameters(pass);
  let_next_start();
  const StreamBlock block = stream_block(p, pass.runs, plan, Stream::kKeys);
  if (block.row < 0) {
    wait_for_previous();
    return;
  }
  if (threadIdx.x < Stream::kStages) {
    full[threadIdx.x].init(32 * Stream::kCopyWarps);
    empty[threadIdx.x].init(4 * plan.team);
  }
  if (threadIdx.x < Sums::kPlaces) {
    // Every thread arrives for its own accesses: racecheck takes an arrival for the arriving thread's alone.
    done[threadIdx.x].init(128 * plan.team);
    taken[threadIdx.x].init(32);
  }
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool separate = p.reduce_group == Reduce::none || p.reduce_group == Reduce::max;
  if (warp >= Stream::kCopyWarp) {
    fewer_registers<Stream::kHelperRegisters>();
    if (warp < Stream::kFinishWarp) {
      const T* row = static_cast<const T*>(p.key) + p.rows.offset(block.row, p.key_stride);
      copy_stream<T, kTile>(ring, full, empty, row, p.key_stride.token, block, p.head_dim, plan.heads.chunks, true);
    } else {
      finish_stream<kTile>(p, plan, block, sums, done, taken);
    }
  } else {
    more_registers<Stream::kConsumerRegisters>();
    // Columns behind the last token: a slice for each block of the row.
    const int32_t dead = p.width - block.tokens;
    if (dead > 0) {
      const int32_t per_row =
          plan.runs > 0 ? plan.runs
                        : static_cast<int32_t>(pass.runs.first_item(block.row + 1) - pass.runs.first_item(block.row));
      const int32_t index = min_of(block.first / pass.runs.run, per_row);
      const int32_t from = min_of(block.tokens, p.width) + static_cast<int32_t>(int64_t{dead} * index / per_row);
      const int32_t to =
          min_of(block.tokens, p.width) + static_cast<int32_t>(int64_t{dead} * min_of(index + 1, per_row) / per_row);
      const int32_t lines = p.reduce_group == Reduce::none ? p.group_size : 1;
      for (int32_t h = 0; h < lines; ++h) {
        float* scores = p.scores + (static_cast<int64_t>(block.row) * lines + h) * p.width;
        for (int32_t j = from + threadIdx.x; j < to; j += Stream::kConsumers) scores[j] = 0.0f;
      }
    }

    const int32_t group = warp / 4, team = group / plan.team, part = group % plan.team;
    const float factor = (p.scale == 0.0f ? 1.0f : fabsf(p.scale)) * kLog2e;
    const Turns turns(plan, group, part);
    const int32_t log_places = plan.log_places(separate), place_lines = plan.lines_of_place(separate);
    int32_t it = team;
    for (int32_t chunk = 0; chunk < plan.heads.chunks; ++chunk) {
      const int32_t rows = plan.rows_in(chunk, p.group_size), q0 = 64 * part + 16 * (warp % 4);
      if (Stream::kSharedQueries && chunk > 0) named_barrier<Stream::kConsumers>(1);
      const ChunkQueries<T, kTile> queries(ring + Stream::kRing, p, plan, block, chunk, team, part);
      if (chunk == 0) wait_for_previous();
      if (block.tiles > 0 || block.first == 0) merge_lse<Stream::kConsumers>(pass, plan, block, chunk, scratch, lse);
      if (team >= plan.teams) continue;
      for (; it < (chunk + 1) * block.tiles; it += plan.teams) {
        const int32_t slot = it % Stream::kStages, place = it & ((1 << log_places) - 1);
        const int32_t first = block.first + ((chunk + 1) * block.tiles - 1 - it) * Stream::kKeys;
        full[slot].wait(it / Stream::kStages & 1);
        if (64 * part < rows) {
          float c[Stream::kProducts];
          multiply<T, kTile>(c, queries.a, ring + slot * Stream::kTileBytes, turns);
          if (lane == 0) empty[slot].arrive();
          if (q0 < rows) {
            mask_tile(c, p, plan, block, chunk, q0 + lane / 4, first);
            const float minus[2] = {-lse[q0 + lane / 4], -lse[q0 + 8 + lane / 4]};
            float mass[2][kColumns][2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
              for (int j = 0; j < kColumns; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) mass[h][j][e] = exp2_fast(fmaf(c[4 * j + 2 * h + e], factor, minus[h]));
              }
            }
            if (!separate) {
#pragma unroll
              for (int j = 0; j < kColumns; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) mass[0][j][e] += mass[1][j][e];
              }
            }
            taken[place].wait((it >> log_places & 1) ^ 1);
            float* lines = sums + place * place_lines * Stream::kKeys;
            sum_queries(mass[0]);
            store_sums(lines + q0 / (separate ? 8 : 16) * Stream::kKeys, mass[0]);
            if (separate) {
              sum_queries(mass[1]);
              store_sums(lines + (q0 / 8 + 1) * Stream::kKeys, mass[1]);
            }
          }
        } else {
          turns.wait();
          turns.pass_on();
          if (lane == 0) empty[slot].arrive();
        }
        // Warps without queries too: nobody may be a phase ahead.
        if (q0 >= rows) taken[place].wait((it >> log_places & 1) ^ 1);
        done[place].arrive();
      }
    }
  }
#else
  __trap();
#endif
}

}  // namespace uncomp::kernels
