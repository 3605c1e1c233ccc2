// SPDX-License-Identifier: Apache-2.0
// How the blocks of a row join their softmax states: each tells all ranks its largest logits and sums, and each rank
// its share of the channels of the output.
#pragma once

#include "kernels/decode_evict/row.cuh"

namespace uncomp::kernels {

/// Four channels of one head of the block's unnormalised output: the four warps' states as one, in warp order.
template <class Slice>
__device__ __forceinline__ uint4 merge_four(const Slice& slice, int head, int channel) {
  static_assert(Slice::kOutStride % 4 == 0);
  float top = -INFINITY;
#pragma unroll
  for (int w = 0; w < kSliceWarps; ++w) top = fmaxf(top, slice.top[w][head]);
  const float base = finite_or_zero(top);
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int w = 0; w < kSliceWarps; ++w) {
    const float weight = exp2_fast(slice.top[w][head] - base);
    const float4 out = *reinterpret_cast<const float4*>(&slice.out[w][head][channel]);
    sum.x += weight * out.x;
    sum.y += weight * out.y;
    sum.z += weight * out.z;
    sum.w += weight * out.w;
  }
  return {__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z), __float_as_uint(sum.w)};
}

/// Hands the block's softmax state to every rank, and each rank its share of the channels of the unnormalised output.
template <class Slice>
__device__ __forceinline__ void tell_state(const DecodeEvictParams& params, const RowPart& part, const Slice& slice,
                                           RowShared& shared, float* received) {
  const int32_t group = params.group_size, dim = params.value_dim, share = part.share;
  const float per_share = 1.0f / static_cast<float>(share), per_dim = 1.0f / static_cast<float>(dim);
#pragma unroll 1
  for (int i = threadIdx.x; i < part.ranks * group; i += kSliceThreads) {
    const int32_t rank = i & (part.ranks - 1), head = i >> part.rank_bits;
    const HeadState state = merge_warps(slice, head, 0);
    const uint64_t both = static_cast<uint64_t>(__float_as_uint(state.sum)) << 32 | __float_as_uint(state.top);
    tell(part, reinterpret_cast<uint64_t*>(&shared.state[part.rank][head]), rank, both, &shared.states_here);
  }
#pragma unroll 1
  for (int i = 4 * threadIdx.x; i < group * dim; i += 4 * kSliceThreads) {
    const int32_t head = small_quotient(i, per_dim), rank = small_quotient(i, per_share);
    float* place = received + part.rank * share + (i - rank * share);
    tell(part, reinterpret_cast<uint4*>(place), rank, merge_four(slice, head, i - head * dim), &shared.states_here);
  }
}

/// Joins the states of all ranks and the new token, in rank order; a warp does one head at a time.
__device__ __forceinline__ void join_ranks(const DecodeEvictParams& params, const RowPart& part, RowShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int head = warp; head < params.group_size; head += kSliceWarps) {
    const float fresh = shared.new_logit[head];
    const float2 state = lane < part.ranks ? shared.state[lane][head] : make_float2(-INFINITY, 0.0f);
    float best = state.x;
#pragma unroll
    for (int offset = kMostRanks / 2; offset > 0; offset /= 2) {
      best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, offset));
    }
    const float base = finite_or_zero(fmaxf(__shfl_sync(kFullWarp, best, 0), fresh));
    const float weight = exp2_fast(state.x - base), own = exp2_fast(fresh - base);
    const float total = warp_sum(weight * state.y) + own;
    if (lane < part.ranks) shared.weight[lane][head] = weight;
    if (lane == 0) {
      shared.weight[kMostRanks][head] = own;
      shared.sum[head] = total;
      shared.lse[head] = total == 0.0f ? -INFINITY : base + log2f(total);
    }
  }
}

/// This rank's share of out, and lse; the last threads begin, because the first have more to do meanwhile. T is the
/// type of out and value.
template <class T>
__device__ __forceinline__ void write_share(const DecodeEvictParams& params, const RowPart& part,
                                            const RowShared& shared, const float* received) {
  const int32_t group = params.group_size, dim = params.value_dim, share = part.share;
  const float per_dim = 1.0f / static_cast<float>(dim);
  const int64_t head0 = static_cast<int64_t>(part.row) * group;
  const T* value =
      static_cast<const T*>(params.value) + part.batch * params.value_batch + part.kv_head * params.value_head;
  T* out = static_cast<T*>(params.out) + head0 * dim;
  const int32_t thread = kSliceThreads - 1 - static_cast<int32_t>(threadIdx.x);
#pragma unroll 1
  for (int j = 4 * thread; j < share; j += 4 * kSliceThreads) {
    const int32_t i = part.rank * share + j;
    if (i >= group * dim) break;
    const int32_t head = small_quotient(i, per_dim);
    const uint2 fresh = *reinterpret_cast<const uint2*>(value + (i - head * dim));
    const T* const own = reinterpret_cast<const T*>(&fresh);
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    const auto add = [&](float weight, const float4& x) {
      sum.x += weight * x.x;
      sum.y += weight * x.y;
      sum.z += weight * x.z;
      sum.w += weight * x.w;
    };
#pragma unroll 4
    for (int rank = 0; rank < part.ranks; ++rank) {
      add(shared.weight[rank][head], *reinterpret_cast<const float4*>(received + rank * share + j));
    }
    add(shared.weight[kMostRanks][head], {to_float(own[0]), to_float(own[1]), to_float(own[2]), to_float(own[3])});
    const float whole = shared.sum[head];
    *reinterpret_cast<uint2*>(out + i) = {pack2<T>(normalised(sum.x, whole), normalised(sum.y, whole)),
                                          pack2<T>(normalised(sum.z, whole), normalised(sum.w, whole))};
  }
  if (part.rank == 0 && thread < group) params.lse[head0 + thread] = shared.lse[thread] * kLn2;
}

}  // namespace uncomp::kernels
