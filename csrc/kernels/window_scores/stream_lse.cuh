// SPDX-License-Identifier: Apache-2.0
// Pass 1 on sm_90a: log-sum-exp of each window query over one run of keys. A thread holds the state of two queries and
// a quarter of each tile's keys in registers; states meet at the end of the run.
#pragma once

#include "kernels/window_scores/stream.cuh"

namespace uncomp::kernels {

#if UNCOMP_SM90A

/// Adds a tile to the states of the thread's two queries.
template <int kProducts>
__device__ __forceinline__ void join_tile(LogSum (&state)[2], float (&c)[kProducts], float factor) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float largest = c[2 * h];
#pragma unroll
    for (int j = 0; j < kProducts / 4; ++j) {
      largest = fmaxf(largest, fmaxf(c[4 * j + 2 * h], c[4 * j + 2 * h + 1]));
    }
    const float top = fmaxf(state[h].max, largest * factor), zero = top == -kInf ? 0.0f : top;
    float even = state[h].total * exp2_fast(state[h].max - zero), odd = 0.0f;
#pragma unroll
    for (int j = 0; j < kProducts / 4; ++j) {
      even += exp2_fast(fmaf(c[4 * j + 2 * h], factor, -zero));
      odd += exp2_fast(fmaf(c[4 * j + 2 * h + 1], factor, -zero));
    }
    state[h] = {top, even + odd};
  }
}

#endif

template <class T, int kTile>
__global__ void __launch_bounds__(KeyStream<T, kTile>::kThreads, 1)
    stream_lse_kernel(const __grid_constant__ LsePass pass) {
#if UNCOMP_SM90A
  using Stream = KeyStream<T, kTile>;
  const WindowScoresParams& p = pass.params;
  extern __shared__ __align__(1024) unsigned char ring[];
  __shared__ __align__(8) PhaseBarrier full[Stream::kStages], empty[Stream::kStages];
  __shared__ float2 states[Stream::kGroups * 64];

  const StreamPlan& plan = pass.plan;
  fetch_parameters(pass);
  wait_for_previous();
  let_next_start();
  const StreamBlock block = stream_block(p, pass.runs, plan, Stream::kKeys);
  if (block.row < 0 || block.tiles == 0) return;
  if (threadIdx.x < Stream::kStages) {
    full[threadIdx.x].init(32 * Stream::kCopyWarps);
    empty[threadIdx.x].init(4 * plan.team);
  }
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= Stream::kCopyWarp) {
    fewer_registers<Stream::kHelperRegisters>();
    if (warp >= Stream::kFinishWarp) return;
    const T* row = static_cast<const T*>(p.key) + p.rows.offset(block.row, p.key_stride);
    copy_stream<T, kTile>(ring, full, empty, row, p.key_stride.token, block, p.head_dim, plan.heads.chunks, false);
  } else {
    more_registers<Stream::kConsumerRegisters>();
    const int32_t group = warp / 4, team = group / plan.team, part = group % plan.team;
    const float factor = (p.scale == 0.0f ? 1.0f : fabsf(p.scale)) * kLog2e;
    const int32_t all = p.group_size * p.window;
    const Turns turns(plan, group, part);
    int32_t it = team;
    for (int32_t chunk = 0; chunk < plan.heads.chunks; ++chunk) {
      const int32_t rows = plan.rows_in(chunk, p.group_size), q0 = 64 * part + 16 * (warp % 4);
      LogSum state[2] = {{-kInf, 0.0f}, {-kInf, 0.0f}};
      const ChunkQueries<T, kTile> queries(ring + Stream::kRing, p, plan, block, chunk, team, part);
      if constexpr (Stream::kSharedQueries) named_barrier<Stream::kConsumers>(1);
      if (team < plan.teams) {
        for (; it < (chunk + 1) * block.tiles; it += plan.teams) {
          const int32_t slot = it % Stream::kStages, first = block.first + (it - chunk * block.tiles) * Stream::kKeys;
          full[slot].wait(it / Stream::kStages & 1);
          if (64 * part < rows) {
            float c[Stream::kProducts];
            multiply<T, kTile>(c, queries.a, ring + slot * Stream::kTileBytes, turns);
            if (lane == 0) empty[slot].arrive();
            if (q0 < rows) {
              mask_tile(c, p, plan, block, chunk, q0 + lane / 4, first);
              join_tile(state, c, factor);
            }
          } else {
            turns.wait();
            turns.pass_on();
            if (lane == 0) empty[slot].arrive();
          }
        }
      }

      // The quarters of a query, then the teams.
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int offset = 1; offset < 4; offset <<= 1) {
          state[h].join({__shfl_xor_sync(0xffffffffu, state[h].max, offset),
                         __shfl_xor_sync(0xffffffffu, state[h].total, offset)});
        }
        if (lane % 4 == 0)
          states[64 * group + 16 * (warp % 4) + 8 * h + lane / 4] = make_float2(state[h].max, state[h].total);
      }
      named_barrier<Stream::kConsumers>(1);
      if (static_cast<int32_t>(threadIdx.x) < rows) {
        const int32_t q = threadIdx.x;
        const PackedQuery packed = packed_query(plan, p.group_size, p.window, block.tokens, chunk, q);
        LogSum joint{-kInf, 0.0f};
        for (int32_t t = 0; t < plan.teams; ++t) {
          const float2 of_team = states[64 * plan.team * t + q];
          joint.join({of_team.x, of_team.y});
        }
        if (packed.head >= 0) {
          pass.partial[static_cast<int64_t>(block.item) * all + packed.head * p.window + packed.i] =
              make_float2(joint.max, joint.total);
        }
      }
      named_barrier<Stream::kConsumers>(1);
    }
  }
#else
  __trap();
#endif
}

}  // namespace uncomp::kernels
