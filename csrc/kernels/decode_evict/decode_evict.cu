// SPDX-License-Identifier: Apache-2.0
// One step as one launch (row_kernel.cuh), or as several: attend (slices of rows), then votes and eviction, one block a
// row. Where rows are few and long their votes are a launch of their own. The borders between launches are the
// barriers.
#include "kernels/decode_evict/decode_evict.h"

#include "kernels/common/launch.cuh"
#include "kernels/decode_evict/evict.cuh"
#include "kernels/decode_evict/evict_cluster.cuh"
#include "kernels/decode_evict/vote.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kBlocksPerSm = 2;
constexpr int kMostThreads = 1024, kVoteThreads = 512;

union RowShared {
  RowSoftmax softmax;
  EvictShared evict;
};
static_assert(sizeof(RowShared) <= 48 * 1024, "static shared memory");

/// Block (part, row) of `parts`.
__global__ void __launch_bounds__(kVoteThreads, 1)
    vote_kernel(const __grid_constant__ DecodeEvictParams params, const __grid_constant__ EvictPlan plan,
                const __grid_constant__ DecodeEvictWorkspace work) {
  __shared__ RowSoftmax softmax;
  const int32_t row = blockIdx.x / plan.vote_slices, part = blockIdx.x % plan.vote_slices;
  vote_row(params, plan, work, row, step_of(params, row), part, plan.vote_slices, softmax);
}

__global__ void __launch_bounds__(kMostThreads, 1)
    evict_kernel(const __grid_constant__ DecodeEvictParams params, const __grid_constant__ DecodeEvictWorkspace work) {
  __shared__ EvictShared shared;
  const int32_t row = blockIdx.x;
  evict_row(params, work, row, step_of(params, row), shared);
}

/// Block (rank, row) of a cluster of `ranks`.
__global__ void __launch_bounds__(kVoteThreads, 1)
    evict_cluster_kernel(const __grid_constant__ DecodeEvictParams params,
                         const __grid_constant__ DecodeEvictWorkspace work, int32_t ranks) {
#if __CUDA_ARCH__ >= 900
  __shared__ EvictClusterShared shared;
  const int32_t row = static_cast<int32_t>(blockIdx.x) / ranks, rank = static_cast<int32_t>(blockIdx.x) % ranks;
  evict_row_together(params, work, row, rank, ranks, shared);
#endif
}

__global__ void __launch_bounds__(kVoteThreads, 1)
    vote_and_evict_kernel(const __grid_constant__ DecodeEvictParams params, const __grid_constant__ EvictPlan plan,
                          const __grid_constant__ DecodeEvictWorkspace work) {
  __shared__ RowShared shared;
  const int32_t row = blockIdx.x;
  const EvictStep step = step_of(params, row);
  vote_row(params, plan, work, row, step, 0, 1, shared.softmax);
  __syncthreads();  // the votes are written, the softmax is read
  evict_row(params, work, row, step, shared.evict);
}

cudaError_t plan_of(const DecodeEvictParams& params, EvictPlan* plan) {
  DeviceInfo info;
  if (const cudaError_t err = device_info(&info); err != cudaSuccess) return err;
  *plan = evict_plan(params.num_rows, params.capacity, info.sm_count * kBlocksPerSm);
  return cudaSuccess;
}

/// Cuts `memory` (may be null); returns its size in bytes.
int64_t cut_workspace(const DecodeEvictParams& params, const EvictPlan& plan, void* memory,
                      DecodeEvictWorkspace* work) {
  int64_t used = 0;
  const auto take = [&](auto** array, int64_t count) {
    char* base = static_cast<char*>(memory);
    *array = reinterpret_cast<std::remove_reference_t<decltype(*array)>>(base == nullptr ? base : base + used);
    used += round_up<int64_t>(count * static_cast<int64_t>(sizeof(**array)), 256);
  };
  const int64_t heads = static_cast<int64_t>(params.num_rows) * params.group_size, parts = heads * plan.most_slices;
  take(&work->logits, params.capacity * params.group_size);
  take(&work->new_logit, heads);
  take(&work->largest, parts);
  take(&work->total, parts);
  take(&work->partial, parts * params.value_dim);
  take(&work->new_vote, params.num_rows);
  return used;
}

cudaError_t launch_attend(const DecodeEvictParams& params, const EvictPlan& plan, const DecodeEvictWorkspace& work,
                          cudaStream_t stream) {
  switch (params.dtype) {
    case DType::float32:
      return evict_attend_fp32(params, plan, work, stream);
    case DType::float16:
      return evict_attend_fp16(params, plan, work, stream);
    case DType::bfloat16:
      return evict_attend_bf16(params, plan, work, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_latents(const DecodeEvictParams& params, KeyTransformParams transform, const EvictPlan& plan,
                           const DecodeEvictWorkspace& work, cudaStream_t stream) {
  transform.slot_position = params.slot_position;
  transform.rows_per_kv = params.rows_per_kv;
  switch (params.dtype) {
    case DType::float32:
      return evict_latents_fp32(params, transform, plan, work, stream);
    case DType::float16:
      return evict_latents_fp16(params, transform, plan, work, stream);
    case DType::bfloat16:
      return evict_latents_bf16(params, transform, plan, work, stream);
  }
  return cudaErrorInvalidValue;
}

/// The last of three launches: a cluster of blocks a row, if the device can.
cudaError_t launch_evict(const DecodeEvictParams& params, const DecodeEvictWorkspace& work, cudaStream_t stream) {
  const void* address = reinterpret_cast<const void*>(evict_cluster_kernel);
  for (int32_t ranks = kMostRanks; ranks > 1; ranks /= 2) {
    int32_t clusters = 0;
    if (const cudaError_t err = active_clusters(address, ranks, kVoteThreads, 0, &clusters); err != cudaSuccess) {
      return err;
    }
    if (clusters == 0) continue;
    const dim3 grid(static_cast<unsigned>(params.num_rows) * static_cast<unsigned>(ranks));
    return launch_kernel({grid, kVoteThreads, 0, stream, ranks}, evict_cluster_kernel, params, work, ranks);
  }
  evict_kernel<<<static_cast<unsigned>(params.num_rows), kMostThreads, 0, stream>>>(params, work);
  return cudaGetLastError();
}

cudaError_t launch_rows(const DecodeEvictParams& params, float* logits, cudaStream_t stream, bool* launched) {
  switch (params.dtype) {
    case DType::float16:
      return evict_rows_fp16(params, logits, stream, launched);
    case DType::bfloat16:
      return evict_rows_bf16(params, logits, stream, launched);
    case DType::float32:
      break;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t decode_evict_workspace_bytes(const DecodeEvictParams& params, int64_t* bytes) {
  EvictPlan plan;
  if (const cudaError_t err = plan_of(params, &plan); err != cudaSuccess) return err;
  DecodeEvictWorkspace unused;
  *bytes = cut_workspace(params, plan, nullptr, &unused);
  return cudaSuccess;
}

cudaError_t decode_evict(const DecodeEvictParams& params, void* workspace, cudaStream_t stream,
                         const KeyTransformParams* transform) {
  if (params.num_rows == 0) return cudaSuccess;
  EvictPlan plan;
  if (const cudaError_t err = plan_of(params, &plan); err != cudaSuccess) return err;
  DecodeEvictWorkspace work;
  cut_workspace(params, plan, workspace, &work);
  if (transform == nullptr) {
    bool done = false;
    if (const cudaError_t err = launch_rows(params, work.logits, stream, &done); err != cudaSuccess || done) return err;
    if (const cudaError_t err = launch_attend(params, plan, work, stream); err != cudaSuccess) return err;
  } else if (const cudaError_t err = launch_latents(params, *transform, plan, work, stream); err != cudaSuccess) {
    return err;
  }
  const unsigned rows = static_cast<unsigned>(params.num_rows);
  if (plan.vote_slices > 1) {
    vote_kernel<<<rows* static_cast<unsigned>(plan.vote_slices), kVoteThreads, 0, stream>>>(params, plan, work);
    if (const cudaError_t err = cudaGetLastError(); err != cudaSuccess) return err;
    return launch_evict(params, work, stream);
  }
  // Few rows: a wide block ends sooner. Many: small blocks overlap each other's waits.
  const int threads = plan.most_slices > 1 ? kVoteThreads : 256;
  vote_and_evict_kernel<<<rows, threads, 0, stream>>>(params, plan, work);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
