// SPDX-License-Identifier: Apache-2.0
// The second half of a step: the softmax states of a row's slices become out and lse, the logits become votes.
#pragma once

#include "core/constants.h"
#include "core/votes.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/types.cuh"
#include "kernels/decode_attention/slice.cuh"
#include "kernels/decode_evict/workspace.h"

namespace uncomp::kernels {

/// Softmax of one row, joined from its slices, in the shared memory of a block.
struct RowSoftmax {
  float lse[kMaxGroupSize];                      // log2 units; -inf where no logit was above it
  float sum[kMaxGroupSize];                      // of 2^(logit - base)
  float weight[kMostSlices + 1][kMaxGroupSize];  // of each slice's partial; the last is the new token's
};

/// A warp joins one head. The order of the sum depends on the number of slices alone.
__device__ __forceinline__ void join_slices(const DecodeEvictParams& params, const EvictPlan& plan,
                                            const DecodeEvictWorkspace& work, int32_t row, int32_t slices,
                                            RowSoftmax& softmax) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, group = params.group_size;
  const int64_t part = static_cast<int64_t>(row) * plan.most_slices;
  for (int head = warp; head < group; head += warps) {
    const float fresh = work.new_logit[static_cast<int64_t>(row) * group + head];
    float top[kMostSlices / 32], sum[kMostSlices / 32], best = -INFINITY;
#pragma unroll
    for (int j = 0; j < kMostSlices / 32; ++j) {
      const int slice = lane + 32 * j;
      top[j] = slice < slices ? work.largest[(part + slice) * group + head] : -INFINITY;
      sum[j] = slice < slices ? work.total[(part + slice) * group + head] : 0.0f;
      best = fmaxf(best, top[j]);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, offset));
    const float base = finite_or_zero(fmaxf(best, fresh));
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kMostSlices / 32; ++j) {
      const float weight = exp2f(top[j] - base);
      if (lane + 32 * j < slices) softmax.weight[lane + 32 * j][head] = weight;
      total += weight * sum[j];
    }
    const float own = exp2f(fresh - base);
    total = warp_sum(total) + own;
    if (lane == 0) {
      softmax.weight[kMostSlices][head] = own;
      softmax.sum[head] = total;
      softmax.lse[head] = total == 0.0f ? -INFINITY : base + log2f(total);
    }
  }
  __syncthreads();
}

/// out [g, Dv] and lse [g] of a row.
__device__ __forceinline__ void write_output(const DecodeEvictParams& params, const EvictPlan& plan,
                                             const DecodeEvictWorkspace& work, int32_t row, int32_t slices,
                                             const RowSoftmax& softmax) {
  const int32_t group = params.group_size, dim = params.value_dim;
  const int64_t head0 = static_cast<int64_t>(row) * group;
  const float* partial = work.partial + static_cast<int64_t>(row) * plan.most_slices * group * dim;
  const int64_t value = row / params.rows * params.value_batch +
                        static_cast<int64_t>(row % params.rows / params.rows_per_kv) * params.value_head;
  for (int i = threadIdx.x; i < group * dim; i += blockDim.x) {
    const int head = i / dim, channel = i % dim;
    float sum = 0.0f;
#pragma unroll 8
    for (int slice = 0; slice < slices; ++slice) sum += softmax.weight[slice][head] * partial[slice * group * dim + i];
    sum += softmax.weight[kMostSlices][head] * load_float(params.value, params.dtype, value + channel);
    store_float(params.out, params.dtype, head0 * dim + i, normalised(sum, softmax.sum[head]));
  }
  if (threadIdx.x < group) params.lse[head0 + threadIdx.x] = softmax.lse[threadIdx.x] * kLn2;
}

/// A row without room: out 0, lse -inf.
__device__ __forceinline__ void write_nothing(const DecodeEvictParams& params, int32_t row) {
  const int32_t group = params.group_size, dim = params.value_dim;
  const int64_t head0 = static_cast<int64_t>(row) * group;
  for (int i = threadIdx.x; i < group * dim; i += blockDim.x)
    store_float(params.out, params.dtype, head0 * dim + i, 0.0f);
  if (threadIdx.x < group) params.lse[head0 + threadIdx.x] = -INFINITY;
}

/// The votes of kTokens tokens, `step` apart in `logits`, whose heads' logits are `stride` apart. "sum" is stored as
/// the mean. A NaN weight of any head makes the vote 0.
template <int kTokens>
__device__ __forceinline__ void votes_of(const DecodeEvictParams& params, const float* logits, int32_t step,
                                         int64_t stride, const float* lse, int32_t bits, int32_t (&vote)[kTokens]) {
  constexpr int kAtOnce = 4;
  const int32_t group = params.group_size;
  const bool largest = params.reduce_group == Reduce::max;
  float all[kTokens] = {};
#pragma unroll 1
  for (int base = 0; base < group; base += kAtOnce) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int head = base + u;
      const float of_head = head < group ? lse[head] : 0.0f;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float weight = head < group ? exp2_fast(logits[head * stride + t * step] - of_head) : 0.0f;
        const float larger = weight > all[t] || weight != weight ? weight : all[t];
        all[t] = largest ? larger : all[t] + weight;
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    vote[t] = quantize_vote(largest ? all[t] : __fdividef(all[t], static_cast<float>(group)), bits);
  }
}

__device__ __forceinline__ int32_t vote_of(const DecodeEvictParams& params, const float* logits, int64_t stride,
                                           const float* lse, int32_t bits) {
  int32_t vote[1];
  votes_of(params, logits, 0, stride, lse, bits, vote);
  return vote[0];
}

/// Replaces the oldest ring row in slots [begin, end), given the arrays from slot 0 on and the logits of head 0. Four
/// slots a thread at a time, so that their loads fly together.
__device__ __forceinline__ void vote_slots(const DecodeEvictParams& params, const float* logits, int64_t stride,
                                           int64_t begin, int64_t end, int32_t* ring, int32_t* sums, const float* lse) {
  constexpr int kAtOnce = 4;
  const int32_t bits = vote_scale_bits(params.vote_window);
  for (int64_t base = begin + threadIdx.x; base < end; base += kAtOnce * blockDim.x) {
    int32_t old[kAtOnce] = {}, sum[kAtOnce] = {}, vote[kAtOnce] = {};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t slot = base + u * static_cast<int64_t>(blockDim.x);
      if (slot < end) {
        old[u] = ring[slot];
        sum[u] = sums[slot];
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t slot = base + u * static_cast<int64_t>(blockDim.x);
      if (slot < end) vote[u] = vote_of(params, logits + slot, stride, lse, bits);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t slot = base + u * static_cast<int64_t>(blockDim.x);
      if (slot < end) {
        ring[slot] = vote[u];
        sums[slot] = moved_sum(sum[u], old[u], vote[u]);
      }
    }
  }
}

/// Steps 1 and 2 of the contract for share `part` of `parts` of a row; share 0 also writes out, lse and the new token's
/// vote. Block-uniform arguments.
__device__ __forceinline__ void vote_row(const DecodeEvictParams& params, const EvictPlan& plan,
                                         const DecodeEvictWorkspace& work, int32_t row, const EvictStep& step,
                                         int32_t part, int32_t parts, RowSoftmax& softmax) {
  if (step.kind == EvictStep::Kind::nothing) {
    if (part == 0) write_nothing(params, row);
    return;
  }
  const int32_t slices = attend_slices(step.len, plan).count;
  join_slices(params, plan, work, row, slices, softmax);
  const int32_t ring_row = vote_ring_row(params.vote_step[row], params.vote_window);
  const int64_t start = params.ragged().start(row);
  vote_slots(params, work.logits + start, params.capacity, int64_t{step.len} * part / parts,
             int64_t{step.len} * (part + 1) / parts, params.votes + ring_row * params.capacity + start,
             params.vote_sum + start, softmax.lse);
  if (part > 0) return;
  if (threadIdx.x == 0) {
    const float* fresh = work.new_logit + static_cast<int64_t>(row) * params.group_size;
    work.new_vote[row] = vote_of(params, fresh, 1, softmax.lse, vote_scale_bits(params.vote_window));
  }
  write_output(params, plan, work, row, slices, softmax);
}

}  // namespace uncomp::kernels
