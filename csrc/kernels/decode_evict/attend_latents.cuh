// SPDX-License-Identifier: Apache-2.0
// Launch 1 of a step over latents: attend.cuh with keys that are made on the way. The new token has a block of its own,
// because its key is a matrix product too.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/decode_attention/latent_block.cuh"
#include "kernels/decode_evict/workspace.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {

/// Block (slice, row); slice `most_slices` is the new token's.
template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    evict_latents_kernel(const __grid_constant__ DecodeEvictParams params,
                         const __grid_constant__ KeyTransformParams transform, const __grid_constant__ EvictPlan plan,
                         const __grid_constant__ DecodeEvictWorkspace work) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int32_t row = blockIdx.x / (plan.most_slices + 1), slice = blockIdx.x % (plan.most_slices + 1);
  const EvictStep step = step_of(params, row);
  const RowSlices slices = attend_slices(step.len, plan);
  const bool newest = slice == plan.most_slices && step.kind != EvictStep::Kind::nothing;
  if (!newest && slice >= slices.count) return;

  LatentBlock<T, Shape> block(memory, transform, params.key_dim);
  const int32_t group = params.group_size, in_sequence = row % params.rows;
  const int64_t batch = row / params.rows;
  const LatentQuery<T> query{in_sequence / params.rows_per_kv,
                             static_cast<const T*>(params.query) + batch * params.query_batch +
                                 static_cast<int64_t>(in_sequence) * group * params.query_head,
                             params.query_head, group, batch};
  const float scale = params.scale * kLog2E;
  if (newest) {
    const T* key = static_cast<const T*>(params.key) + batch * params.key_batch +
                   in_sequence / params.rows_per_kv * params.key_head;
    float* logits = work.new_logit + static_cast<int64_t>(row) * group;
    block.attend_new(query, key, params.position[batch], scale, [=](int head, float logit) { logits[head] = logit; });
    return;
  }

  const int32_t begin = slices.begin(slice) * kEvictTile;
  const int32_t count = min_of(slices.end(slice) * static_cast<int64_t>(kEvictTile), int64_t{step.len}) - begin;
  const int64_t slot = params.ragged().start(row) + begin;
  float* logits = work.logits + slot;
  const int64_t capacity = params.capacity;
  block.attend(query, static_cast<const T*>(params.key_rows), static_cast<const T*>(params.value_rows), slot, count,
               params.value_dim, scale, [=](int at, int head, float logit) {
                 if (head < group) logits[head * capacity + at] = logit;
               });

  const int64_t part = static_cast<int64_t>(row) * plan.most_slices + slice;
  float* partial = work.partial + part * group * params.value_dim;
  for (int i = threadIdx.x; i < group * params.value_dim; i += Shape::kThreads) {
    const int head = i / params.value_dim, channel = i % params.value_dim;
    const HeadState state = merge_warps(block.shared, head, channel);
    partial[i] = state.out;
    if (channel == 0) {
      work.largest[part * group + head] = state.top;
      work.total[part * group + head] = state.sum;
    }
  }
}

template <class T, class Shape>
cudaError_t launch_evict_latents(const DecodeEvictParams& params, const KeyTransformParams& transform,
                                 const EvictPlan& plan, const DecodeEvictWorkspace& work, cudaStream_t stream) {
  const auto kernel = evict_latents_kernel<T, Shape>;
  const size_t bytes = LatentBlock<T, Shape>::bytes(transform.dim, params.group_size);
  if (const cudaError_t err = allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes); err != cudaSuccess) {
    return err;
  }
  const int64_t blocks = static_cast<int64_t>(params.num_rows) * (plan.most_slices + 1);
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, bytes, stream>>>(params, transform, plan, work);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
