// SPDX-License-Identifier: Apache-2.0
// The sm_90a kernel: a block a multiprocessor walks its share of the query tiles (core/query_shares.h). One warpgroup
// loads, one or two compute with wgmma. While a computing warpgroup turns the scores of a key tile into weights, the
// values of the tile before are summed up by the matrix unit; two warpgroups take turns at it.
#pragma once

#include "kernels/ragged_attention/finish.cuh"
#include "kernels/ragged_attention/warpgroup_compute.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {

inline constexpr int kMostThreads = kGroupThreads * (1 + kMostGroups);
/// Of 168 registers a thread that a block of three warpgroups can have.
inline constexpr int kLoadRegisters = 56, kComputeRegisters = 224;
static_assert(kLoadRegisters + kMostGroups * kComputeRegisters <= 3 * 168);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/// The end of a tile that this block did all of: its results go by way of the warpgroup's buffer, so that whole rows
/// are written at a time.
template <class T, int kPieces, int kCount>
__device__ __forceinline__ void write_results(const RaggedAttentionParams& params, const WarpgroupPlan& plan,
                                              const QueryTile& tile, unsigned char* buffer, int group,
                                              const RowPair& state, const float (&out)[kPieces][kCount]) {
  constexpr int kChunks = kPieces * kCount / 4;
  const int warp = threadIdx.x % kGroupThreads / 32, lane = threadIdx.x % 32;
  const QueryRow row = tile.row;
  const int32_t value_dim = params.value_dim, m_begin = tile.m_begin + group * kGroupQueries + warp * 16;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = lane / 4 + 8 * i;
    const int32_t token = plan.by_group_size.divide(m_begin + r), head = m_begin + r - token * params.group_size;
    QueryFinish finish{0.0f, 0.0f, -INFINITY, 0};
    if (row.valid(token)) {
      finish = finish_query(params, row.sequence, row.first_head + head, token, state.top[i], state.sum[i]);
    }
    if (lane % 4 == 0 && token < params.tokens.seq_len) params.lse[result_index(params, row, head, token)] = finish.lse;
    const auto store = [&](auto channel_of) {
#pragma unroll
      for (int n = 0; n < kChunks; ++n) {
        const int channel = 8 * n + 2 * (lane % 4), at = 4 * n % kCount + 2 * i;
        const float(&from)[kCount] = out[4 * n / kCount];
        *reinterpret_cast<uint32_t*>(buffer + chunk_offset(warp * 16 + r, n, kGroupQueries) + 4 * (lane % 4)) =
            pack2<T>(channel_of(channel, from[at]), channel_of(channel + 1, from[at + 1]));
      }
    };
    if (finish.other == 0.0f) {
      store([&](int, float x) { return finish.own == 0.0f ? 0.0f : finish.own * x; });
    } else {
      store([&](int channel, float x) {
        return channel < value_dim ? finish_channel<T>(params, finish, channel, x) : 0.0f;
      });
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int r = i / kChunks, chunk = i % kChunks;
    const int32_t token = plan.by_group_size.divide(m_begin + r), head = m_begin + r - token * params.group_size;
    const uint4 x = *reinterpret_cast<const uint4*>(buffer + chunk_offset(warp * 16 + r, chunk, kGroupQueries));
    if (token < params.tokens.seq_len && 8 * chunk < value_dim) {
      *reinterpret_cast<uint4*>(static_cast<T*>(params.out) + result_index(params, row, head, token) * value_dim +
                                8 * chunk) = x;
    }
  }
}

/// The end of a tile that other blocks have parts of: the state as it is.
template <int kPieces, int kCount>
__device__ __forceinline__ void write_state(const RaggedAttentionParams& params, const WarpgroupPlan& plan,
                                            const QueryTile& tile, int32_t place, int group, const RowPair& state,
                                            const float (&out)[kPieces][kCount]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t local = group * kGroupQueries + threadIdx.x % kGroupThreads / 32 * 16 + lane / 4 + 8 * i;
    if (!tile.row.valid(plan.by_group_size.divide(tile.m_begin + local))) continue;
    const int64_t at = int64_t{place} * plan.queries() + local;
    if (lane % 4 == 0) plan.state[at] = make_float2(state.top[i], state.sum[i]);
    float* to = plan.out + at * params.value_dim;
#pragma unroll
    for (int n = 0; n < kPieces * kCount / 4; ++n) {
      const int channel = 8 * n + 2 * (lane % 4);
      const float(&from)[kCount] = out[4 * n / kCount];
      if (channel < params.value_dim) {
        *reinterpret_cast<float2*>(to + channel) =
            make_float2(from[4 * n % kCount + 2 * i], from[4 * n % kCount + 2 * i + 1]);
      }
    }
  }
}

template <class T, int kDim>
__device__ __forceinline__ void compute_tiles(const RaggedAttentionParams& params, const WarpgroupPlan& plan,
                                              const BlockMemory& memory, int group) {
  constexpr int kKeys = warpgroup_keys(kDim), kPieces = kDim > 128 ? 2 : 1;
  BlockControl& control = *memory.control;
  const int lane = threadIdx.x % 32;
  const bool turns = plan.groups > 1;
  const float scale = params.scale * kLog2E;
  const auto take_turn = [&] {
    if (turns) meet_warps(kTurnBarrier + group, kMostGroups * kGroupThreads);
  };
  const auto pass_turn = [&] {
    if (turns) signal_warps(kTurnBarrier + 1 - group, kMostGroups * kGroupThreads);
  };
  if (group == 1) pass_turn();

  RingPlace tile_place, query_place;
  const auto slot = [&](const RingPlace& place) { return memory.ring + place.index * slot_bytes(kDim); };
  const auto await_tile = [&](const RingPlace& place) { await(&control.full[place.index], place.parity); };
  const auto release = [&](const RingPlace& place) {
    if (lane == 0) arrive(&control.empty[place.index]);
  };
  for (bool last = false; !last; query_place.step(plan.query_buffers)) {
    await(&control.query_full[query_place.index], query_place.parity);
    const TileWork& work = control.work[query_place.index];
    last = work.last;
    unsigned char* buffer = memory.query + (query_place.index * plan.groups + group) * query_bytes(kDim);
    const uint32_t query = shared_address(buffer);
    const int32_t count = work.key_tiles(), first = work.tile.row.first;
    const int32_t m = work.tile.m_begin + group * kGroupQueries;

    float out[kPieces][kDim / kPieces / 2] = {};
    float score[kKeys / 2], shrink[2];
    uint32_t weight[kKeys / 16][4];
    RowPair state;
    const auto weigh = [&](int32_t index) {
      const KeyTile keys = work.tile.keys.at(index, kKeys);
      if (keys.live < kKeys || (keys.is_new && plan.by_group_size.divide(m) - first - keys.begin < kKeys - 1)) {
        const int32_t r = m + threadIdx.x % kGroupThreads / 32 * 16 + lane / 4;
        const int32_t seen[2] = {visible_keys(keys, plan.by_group_size.divide(r), first),
                                 visible_keys(keys, plan.by_group_size.divide(r + 8), first)};
        hide_keys(score, seen);
      }
      soften(score, state, shrink, scale);
    };
    // Values of a tile, whose slot is at `tile_place`.
    const auto add_values = [&](int32_t index) {
      const int32_t live = work.tile.keys.at(index, kKeys).live;
      await_tile(tile_place);
      if (live < kKeys) clear_dead_values<kDim>(slot(tile_place), live, group);
      wgmma_fence();
      multiply_values<T, kKeys>(out, weight, shared_address(slot(tile_place)));
      wgmma_commit();
    };
    const int32_t begin = work.part.begin;
    if (count > 0) {
      await_tile(tile_place);
      take_turn();
      wgmma_fence();
      multiply_keys<T, kDim>(score, query, shared_address(slot(tile_place)));
      wgmma_commit();
      pass_turn();
      wgmma_wait<0>();
      wgmma_settle(score);
      release(tile_place);
      tile_place.step(plan.slots);
      weigh(begin);
      pack_weights<T>(weight, score);
      for (int32_t i = 1; i < count; ++i) {
        const RingPlace keys = tile_place;
        await_tile(keys);
        take_turn();
        wgmma_fence();
        multiply_keys<T, kDim>(score, query, shared_address(slot(keys)));
        wgmma_commit();
        tile_place.step(plan.slots);
        add_values(begin + i - 1);
        pass_turn();
        wgmma_wait<1>();
        wgmma_settle(score);
        release(keys);
        weigh(begin + i);
        if (state.sum[0] + state.sum[1] < 0.0f) asm volatile("nanosleep.u32 0;" ::: "memory");
        wgmma_wait<0>();
        wgmma_settle(score);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) wgmma_settle(out[piece]);
        release(tile_place);
        tile_place.step(plan.slots);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
          for (int n = 0; n < kDim / kPieces / 2; ++n) out[piece][n] *= shrink[n / 2 % 2];
        }
        pack_weights<T>(weight, score);
      }
      add_values(begin + count - 1);
      wgmma_wait<0>();
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) wgmma_settle(out[piece]);
      release(tile_place);
      tile_place.step(plan.slots);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      state.top[i] *= scale;
      state.sum[i] += __shfl_xor_sync(kFullWarp, state.sum[i], 1);
      state.sum[i] += __shfl_xor_sync(kFullWarp, state.sum[i], 2);
    }
    meet_warps(kAloneBarrier + group, kGroupThreads);  // no matrix instruction reads the buffer any more
    if (work.part.whole()) {
      write_results<T>(params, plan, work.tile, buffer, group, state, out);
    } else {
      const int32_t place = work.part.place(static_cast<int32_t>(blockIdx.x));
      write_state(params, plan, work.tile, place, group, state, out);
    }
    // Every thread for what it read and wrote itself: lanes part where their queries are not all real.
    arrive(&control.query_empty[query_place.index]);
  }
  if (group == 0) take_turn();  // every signal is met
}
#endif

template <class T, int kDim>
__global__ void __launch_bounds__(kMostThreads, 1)
    warpgroup_kernel(const __grid_constant__ RaggedAttentionParams params, const __grid_constant__ WarpgroupPlan plan,
                     const __grid_constant__ RaggedMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  BlockMemory memory;
  memory.ring = shared_memory;
  memory.query = memory.ring + plan.slots * slot_bytes(kDim);
  memory.control = reinterpret_cast<BlockControl*>(memory.query + plan.query_buffers * plan.groups * query_bytes(kDim));
  BlockControl& control = *memory.control;
  constexpr int kLoaders = kGroupThreads - 32;
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < plan.slots; ++i) {
      make_barrier(&control.full[i], 1);
      make_barrier(&control.empty[i], 4 * plan.groups);
    }
#pragma unroll 1
    for (int i = 0; i < plan.query_buffers; ++i) {
      make_barrier(&control.query_full[i], kLoaders);
      make_barrier(&control.query_empty[i], kGroupThreads * plan.groups);
    }
    make_barrier(&control.query_asked, kLoaders);
    publish_barriers();
  }
  const Share share = find_share<warpgroup_keys(kDim)>(params, plan, control.scratch);
  const int warpgroup = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  if (warpgroup == 0) {
    give_registers<kLoadRegisters>();
    const ShareWalk walk{share};
    const int warp = threadIdx.x / 32;
    if (warp > 0) {
      stream_queries<T, kDim>(params, plan, memory, walk, threadIdx.x - 32, kLoaders);
      if (threadIdx.x == 32) plan.ends[blockIdx.x] = share_ends<warpgroup_keys(kDim)>(params, plan, share);
    } else if (threadIdx.x == 0) {
      stream_keys<kDim>(params, plan, maps, memory, walk);
    }
  } else {
    take_registers<kComputeRegisters>();
    if (share.units > 0) compute_tiles<T, kDim>(params, plan, memory, warpgroup - 1);
  }
#endif
}

template <class T, int kDim>
cudaError_t launch_warpgroup_kernel(const RaggedAttentionParams& params, const WarpgroupPlan& plan,
                                    const RaggedMaps& maps, cudaStream_t stream) {
  const size_t bytes = block_bytes(kDim, plan.groups, plan.slots, plan.query_buffers);
  const auto kernel = warpgroup_kernel<T, kDim>;
  if (const cudaError_t err = allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes); err != cudaSuccess) {
    return err;
  }
  kernel<<<plan.workers, kGroupThreads*(1 + plan.groups), bytes, stream>>>(params, plan, maps);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_warpgroups(const RaggedAttentionParams& params, const WarpgroupPlan& plan, const RaggedMaps& maps,
                              cudaStream_t stream) {
  if (plan.dim == 64) return launch_warpgroup_kernel<T, 64>(params, plan, maps, stream);
  if (plan.dim == 128) return launch_warpgroup_kernel<T, 128>(params, plan, maps, stream);
  return launch_warpgroup_kernel<T, 256>(params, plan, maps, stream);
}

}  // namespace uncomp::kernels
