// SPDX-License-Identifier: Apache-2.0
// Launch 1 of a step: a block attends over one slice of one row and leaves the logits of its slots and a softmax state.
// The block of slice 0 also makes the logits of the new token. A row's slices are found from the device's lengths.
#pragma once

#include "core/constants.h"
#include "kernels/common/reduce.cuh"
#include "kernels/decode_attention/slice.cuh"
#include "kernels/decode_evict/workspace.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {

/// Channels of the new key that a lane holds: every 32nd.
inline constexpr int kLaneChannels = kMaxHeadDim / 32;

template <class T, int kTile, int kHeads>
__global__ void __launch_bounds__(kSliceThreads, 2)
    evict_attend_kernel(const __grid_constant__ DecodeEvictParams params, const __grid_constant__ EvictPlan plan,
                        const __grid_constant__ DecodeEvictWorkspace work) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<SliceShared<T, kTile, kHeads>*>(memory);
  const int32_t row = blockIdx.x / plan.most_slices, slice = blockIdx.x % plan.most_slices;
  const EvictStep step = step_of(params, row);
  const RowSlices slices = attend_slices(step.len, plan);
  const bool live = slice < slices.count, first = slice == 0 && step.kind != EvictStep::Kind::nothing;
  if (!live && !first) return;

  const int32_t group = params.group_size, in_sequence = row % params.rows;
  const int64_t batch = row / params.rows;
  const T* query = static_cast<const T*>(params.query) + batch * params.query_batch +
                   static_cast<int64_t>(in_sequence) * group * params.query_head;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // The new key is on its way while the query is fetched.
  float new_key[kLaneChannels];
  if (first) {
    const T* key = static_cast<const T*>(params.key) + batch * params.key_batch +
                   in_sequence / params.rows_per_kv * params.key_head;
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) {
      const int channel = lane + 32 * j;
      new_key[j] = channel < params.key_dim ? to_float(key[channel]) : 0.0f;
    }
  }
  load_query(shared, query, params.query_head, group, params.key_dim);
  const float scale = params.scale * kLog2E;
  if (first) {
    for (int head = warp; head < group; head += kSliceWarps) {
      float dot = 0.0f;
#pragma unroll
      for (int j = 0; j < kLaneChannels; ++j) {
        const int channel = lane + 32 * j;
        if (channel < params.key_dim) dot += to_float(query[head * params.query_head + channel]) * new_key[j];
      }
      dot = warp_sum(dot);
      if (lane == 0) work.new_logit[static_cast<int64_t>(row) * group + head] = dot * scale;
    }
  }
  if (!live) return;
  __syncthreads();

  const int32_t begin = slices.begin(slice) * kEvictTile;
  const int32_t count = min_of(slices.end(slice) * static_cast<int64_t>(kEvictTile), int64_t{step.len}) - begin;
  const int64_t slot = params.ragged().start(row) + begin;
  float* logits = work.logits + slot;
  const int64_t capacity = params.capacity;
  attend_slice(shared, static_cast<const T*>(params.key_rows) + slot * params.key_dim,
               static_cast<const T*>(params.value_rows) + slot * params.value_dim, count, params.key_dim,
               params.value_dim, scale, [=](int at, int head, float logit) {
                 if (head < group) logits[head * capacity + at] = logit;
               });

  const int64_t part = static_cast<int64_t>(row) * plan.most_slices + slice;
  float* partial = work.partial + part * group * params.value_dim;
  for (int i = threadIdx.x; i < group * params.value_dim; i += kSliceThreads) {
    const int head = i / params.value_dim, channel = i % params.value_dim;
    const HeadState state = merge_warps(shared, head, channel);
    partial[i] = state.out;
    if (channel == 0) {
      work.largest[part * group + head] = state.top;
      work.total[part * group + head] = state.sum;
    }
  }
}

template <class T, int kTile, int kHeads>
cudaError_t launch_attend(const DecodeEvictParams& params, const EvictPlan& plan, const DecodeEvictWorkspace& work,
                          cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(SliceShared<T, kTile, kHeads>);
  const auto kernel = evict_attend_kernel<T, kTile, kHeads>;
  if (const cudaError_t err = allow_shared_memory(reinterpret_cast<const void*>(kernel), kBytes); err != cudaSuccess) {
    return err;
  }
  const int64_t blocks = static_cast<int64_t>(params.num_rows) * plan.most_slices;
  kernel<<<static_cast<unsigned>(blocks), kSliceThreads, kBytes, stream>>>(params, plan, work);
  return cudaGetLastError();
}

/// The tiles of decode_attention.
template <class T>
cudaError_t launch_attend_half(const DecodeEvictParams& params, const EvictPlan& plan, const DecodeEvictWorkspace& work,
                               cudaStream_t stream) {
  const int32_t dim = max_of(params.key_dim, params.value_dim);
  const bool few = params.group_size <= 8;
  if (dim <= 64 && few) return launch_attend<T, 64, 8>(params, plan, work, stream);
  if (dim <= 128) {
    return few ? launch_attend<T, 128, 8>(params, plan, work, stream)
               : launch_attend<T, 128, 16>(params, plan, work, stream);
  }
  return few ? launch_attend<T, 256, 8>(params, plan, work, stream)
             : launch_attend<T, 256, 16>(params, plan, work, stream);
}

}  // namespace uncomp::kernels
