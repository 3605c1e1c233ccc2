// SPDX-License-Identifier: Apache-2.0
// The one-launch kernel of a step, and its launch.
#pragma once

#include "kernels/common/dependent.cuh"
#include "kernels/decode_evict/row_choice.cuh"
#include "kernels/decode_evict/row_states.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {

/// Shared memory of a block: the slice, what the ranks tell each other, shares of the output, logits.
template <class Slice>
struct RowLayout {
  static constexpr int32_t kShared = round_up<int32_t>(sizeof(Slice), 16);
  static constexpr int32_t kStage = kShared + static_cast<int32_t>(sizeof(RowShared));
  static constexpr int32_t kReceived = kStage + (RowStage<Slice>::kApart ? RowStage<Slice>::kBytes : 0);

  /// Channels of the output that a rank gets, over all heads: whole groups of four.
  static constexpr int32_t share(int32_t group, int32_t value_dim, int32_t ranks) {
    return round_up(ceil_div(group * value_dim, ranks), 4);
  }
  UNCOMP_HD static constexpr int32_t logits(int32_t ranks, int32_t share) { return kReceived + 4 * ranks * share; }
  /// Slots whose logits fit into `bytes` in all: 4 more than a multiple of 16, so that the stores of a warp, 8 slots of
  /// up to 4 heads, meet every bank once; and no more than can be staged.
  static constexpr int32_t held(int64_t bytes, int32_t group, int32_t value_dim) {
    const int64_t words = (bytes - logits(kMostRanks, share(group, value_dim, kMostRanks))) / 4 / group;
    return words < 4 ? 0 : static_cast<int32_t>((words - 4) / 16 * 16 + 4);
  }
};
static_assert(sizeof(RowShared) % 16 == 0);

inline constexpr int kRowBlocksPerSm = 2;

template <class T, int kTile, int kHeads>
__global__ void __launch_bounds__(kSliceThreads, kRowBlocksPerSm)
    evict_row_kernel(const __grid_constant__ DecodeEvictParams params, const __grid_constant__ RankPlan plan,
                     float* __restrict__ far_logits) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char memory[];
  using Slice = SliceShared<T, kTile, kHeads>;
  using Layout = RowLayout<Slice>;
  using Stage = RowStage<Slice>;
  auto& slice = *reinterpret_cast<Slice*>(memory);
  auto& shared = *reinterpret_cast<RowShared*>(memory + Layout::kShared);
  float* received = reinterpret_cast<float*>(memory + Layout::kReceived);

  const int32_t group = params.group_size;
  RowPart part{};
  part.ranks = plan.ranks;
  part.rank_bits = plan.rank_bits;
  part.share = plan.share;
  part.rank = static_cast<int32_t>(blockIdx.x) & (plan.ranks - 1);
  const int32_t in_sequence = static_cast<int32_t>(blockIdx.x) >> plan.rank_bits;
  part.batch = blockIdx.y;
  part.kv_head = params.rows_per_kv == 1 ? in_sequence : in_sequence / params.rows_per_kv;
  part.row = static_cast<int32_t>(blockIdx.y) * params.rows + in_sequence;
  if (part.ranks > 1) {  // none of this waits for the kernel before
    if (threadIdx.x == 0) {
      mail_init(&shared.states_here, 1);
      mail_init(&shared.sums_ready, part.ranks);
      mail_init(&shared.departures_here, 1);
      const int32_t mine = clamp<int32_t>(group * params.value_dim - part.rank * part.share, 0, part.share);
      mail_expect(&shared.states_here, part.ranks * 4 * (2 * group + mine));
      mail_expect(&shared.departures_here, part.ranks * kSliceWarps * static_cast<int32_t>(sizeof(Departure)));
    }
    __syncwarp();
    cluster_arrive_relaxed();
  }
  wait_for_previous();
  let_next_start();

  // Bounds of the row, query and new token are fetched together: none waits for another.
  const int32_t row_start = params.row_start[part.row], row_end = params.row_start[part.row + 1];
  const int32_t row_len = params.row_len[part.row], vote_step = params.vote_step[part.row];
  const T* query = static_cast<const T*>(params.query) + part.batch * params.query_batch +
                   static_cast<int64_t>(in_sequence) * group * params.query_head;
  const NewKeyInFlight<T> new_key(params, part);
  const QueryInFlight<T, kTile, kHeads> fetched(query, params.query_head, group, params.key_dim);

  part.start = clamp<int64_t>(row_start, 0, params.capacity);
  const int64_t room = clamp<int64_t>(row_end, 0, params.capacity) - part.start;
  part.step = evict_step(row_len, static_cast<int32_t>(max_of<int64_t>(room, 0)), params.window, params.sink);
  if (part.step.kind == EvictStep::Kind::nothing) {
    if (part.ranks > 1) cluster_wait();
    if (part.rank == 0) write_nothing(params, part.row);
    return;
  }
  part.slice = rank_slice(part.step.len, plan.rank_bits);
  part.begin = static_cast<int32_t>(min_of<int64_t>(int64_t{part.rank} * part.slice, part.step.len));
  part.count = min_of(part.slice, part.step.len - part.begin);
  part.ring_row = vote_ring_row(vote_step, params.vote_window);
  part.near = part.slice <= plan.held;
  const int32_t half = params.pool / 2, end = part.begin + part.count;
  part.first = part.begin - half;
  part.held = part.count > 0 ? max_of(part.begin - half, 0) : end;
  part.stop = part.count > 0 ? end + min_of(max_of(half, 1), part.step.len - end) : end;
  const int64_t slot0 = part.start + part.begin;
  int32_t* ring = params.votes + part.ring_row * params.capacity + slot0;
  int32_t* sums = params.vote_sum + slot0;
  int32_t* order = params.order + part.start;
  float* logits =
      part.near ? reinterpret_cast<float*>(memory + Layout::logits(plan.ranks, plan.share)) : far_logits + slot0;
  const int64_t stride = part.near ? plan.held : params.capacity;
  // A short slice is done before L2 forgets; a long one asks for its votes at the end.
  constexpr int32_t kShort = 512;
  if (part.count > 0 && part.count <= kShort) {
    fetch_words(ring, part.count);
    fetch_words(sums, part.count);
    fetch_words(order + part.begin, part.count);
  }
  start_late(plan);
  const float scale = params.scale * kLog2E;
  attend_slice(
      slice, static_cast<const T*>(params.key_rows) + slot0 * params.key_dim,
      static_cast<const T*>(params.value_rows) + slot0 * params.value_dim, part.count, params.key_dim, params.value_dim,
      scale,
      [=](int at, int head, float logit) {
        if (head < group) logits[head * stride + at] = logit;
      },
      [&] {
        fetched.store(slice);
        new_key.store(shared);
        __syncthreads();
        new_logits(params, slice, scale, shared);
      });

  const Stage stage(memory, memory + Layout::kStage);
  if (part.near) stage.fetch(part, ring, sums, order);
  NewToken token;
  token.load(params, part);
  if (part.ranks > 1) cluster_wait();  // every rank runs
  tell_state(params, part, slice, shared, received);
  hear(part, &shared.states_here);
  join_ranks(params, part, shared);
  cp_async_wait<0>();
  __syncthreads();
  if (part.near) {
    vote_near(params, part, logits, stride, shared.lse, ring, sums, stage);
  } else {
    vote_slots(params, logits, params.capacity, 0, part.count, ring, sums, shared.lse);
  }

  int32_t slot = part.step.len;
  const bool evicts = part.step.kind == EvictStep::Kind::evict;
  int32_t after = 0;
  if (evicts) {
    __syncthreads();
    if (part.ranks > 1) {
      if (part.near) {
        if (threadIdx.x < part.ranks) mail_arrive(&shared.sums_ready, threadIdx.x);
        mail_wait(&shared.sums_ready);
      } else {
        cluster_barrier();
      }
    }
    const Departure first = choose_in_slice(params, part, order, params.vote_sum + part.start, stage);
    if (!part.near) {
      if (end < part.step.len) after = slot_at(order, end, part.step.len);
      if (part.ranks > 1) cluster_barrier();
    }
    for (int rank = threadIdx.x % 32; rank < part.ranks; rank += 32) {
      static_assert(sizeof(Departure) == 16);
      Departure* target = &shared.departure[part.rank * kSliceWarps + threadIdx.x / 32];
      tell(part, reinterpret_cast<uint4*>(target), rank, reinterpret_cast<const uint4&>(first),
           &shared.departures_here);
    }
  }
  // While candidates are on their way.
  write_share<T>(params, part, shared, received);
  if (evicts) {
    // A warp tells its departure once its block has read what it needs of the others' shared memory: a block that has
    // heard every warp of every rank is neither read nor sent anything any more, and may end.
    hear(part, &shared.departures_here);
    const Departure leaver = first_of_ranks(part, shared.departure, kSliceWarps);
    slot = leaver.slot;
    const int32_t from = max_of(leaver.place, part.begin);
    if (part.near) {
#pragma unroll 1
      for (int32_t p = from + static_cast<int32_t>(threadIdx.x); p < end; p += kSliceThreads) {
        order[p] = p + 1 < part.step.len ? stage.slot[p + 1 - part.first] : slot;
      }
    } else {
      shift_down(order, from, end, end < part.step.len ? after : slot);
    }
  }

  // The block that wrote the votes of the slot writes over them; a slot that nobody had is block 0's.
  const bool mine = evicts ? slot >= part.begin && slot < part.begin + part.count : part.rank == 0;
  if (!mine) return;
  const int64_t target = part.start + slot;
  token.store(params, target);
  const int32_t own = vote_of(params, shared.new_logit, 1, shared.lse, vote_scale_bits(params.vote_window));
  for (int32_t w = threadIdx.x; w < params.vote_window; w += kSliceThreads) {
    params.votes[w * params.capacity + target] = w == part.ring_row ? own : 0;
  }
  if (threadIdx.x == 0) {
    params.vote_sum[target] = own;
    params.slot_position[target] = params.position[part.batch];
    params.vote_step[part.row] = vote_ring_row(part.ring_row + 1, params.vote_window);
    params.row_len[part.row] = part.step.len + (evicts ? 0 : 1);
    if (!evicts) order[slot] = slot;
  }
#endif
}

/// Launches the step where a cluster of blocks a row is worth it; `launched` tells.
template <class T, int kTile, int kHeads>
cudaError_t launch_rows(const DecodeEvictParams& params, float* logits, cudaStream_t stream, bool* launched) {
  using Slice = SliceShared<T, kTile, kHeads>;
  using Layout = RowLayout<Slice>;
  const auto kernel = evict_row_kernel<T, kTile, kHeads>;
  const void* address = reinterpret_cast<const void*>(kernel);
  *launched = false;
  DeviceInfo info;
  if (const cudaError_t err = device_info(&info); err != cudaSuccess) return err;
  const int32_t sequences = params.num_rows / params.rows;
  if (info.capability < 90 || sequences > 65535) return cudaSuccess;

  // Two blocks a multiprocessor, so that one streams while the other is at its votes.
  const int64_t bytes = (info.smem_per_block + 1024) / kRowBlocksPerSm - 1024;
  RankPlan plan{};
  plan.held = min_of(Layout::held(bytes, params.group_size, params.value_dim), RowStage<Slice>::kSlots);
  plan.ranks = rank_count(params.num_rows, params.capacity, kRowBlocksPerSm * info.sm_count, plan.held, kMostRanks);
  if (!row_launch_pays(params.num_rows, params.capacity, info.sm_count, plan)) return cudaSuccess;
  if (const cudaError_t err = allow_shared_memory(address, bytes); err != cudaSuccess) return err;
  for (;; plan.ranks /= 2) {
    int32_t clusters = 0;
    if (const cudaError_t err = active_clusters(address, plan.ranks, kSliceThreads, bytes, &clusters);
        err != cudaSuccess) {
      return err;
    }
    // Clusters that need a second round for the last few rows take longer than half as many blocks a row.
    const bool second_round =
        clusters < params.num_rows && plan.ranks * params.num_rows <= kRowBlocksPerSm * info.sm_count;
    const bool half_fits = params.capacity <= int64_t{params.num_rows} * (plan.ranks / 2) * plan.held;
    if (clusters > 0 && !(second_round && half_fits)) break;
    if (plan.ranks == 1) return cudaSuccess;
  }
  while (1 << plan.rank_bits < plan.ranks) ++plan.rank_bits;
  plan.share = Layout::share(params.group_size, params.value_dim, plan.ranks);
  if (int64_t{plan.ranks} * params.num_rows > kRowBlocksPerSm * info.sm_count) {
    plan.first_round = kRowBlocksPerSm * info.sm_count;
    plan.late_clocks = late_clocks(params.capacity / (int64_t{plan.ranks} * params.num_rows),
                                   (params.key_dim + params.value_dim) * dtype_bytes(params.dtype));
  }

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(plan.ranks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(params.rows * plan.ranks), static_cast<unsigned>(sequences));
  config.blockDim = dim3(kSliceThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = plan.ranks > 1 ? 2 : 1;
  *launched = true;
  return cudaLaunchKernelEx(&config, kernel, params, plan, logits);
}

/// The tiles of decode_attention, but for the largest: it is too rare to be compiled twice.
template <class T>
cudaError_t launch_rows_half(const DecodeEvictParams& params, float* logits, cudaStream_t stream, bool* launched) {
  const int32_t dim = max_of(params.key_dim, params.value_dim);
  const bool few = params.group_size <= 8;
  *launched = false;
  if (dim <= 64 && few) return launch_rows<T, 64, 8>(params, logits, stream, launched);
  if (dim <= 128) {
    return few ? launch_rows<T, 128, 8>(params, logits, stream, launched)
               : launch_rows<T, 128, 16>(params, logits, stream, launched);
  }
  return few ? launch_rows<T, 256, 8>(params, logits, stream, launched) : cudaSuccess;
}

}  // namespace uncomp::kernels
