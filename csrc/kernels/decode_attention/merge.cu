// SPDX-License-Identifier: Apache-2.0
// decode_attention: two launches. The split kernel leaves the parts of shared rows, the merge kernel joins them in
// worker order; the border between the launches is the barrier.
#include "core/constants.h"
#include "core/splits.h"
#include "kernels/common/dependent.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/types.cuh"
#include "kernels/decode_attention/workspace.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kBlocksPerSm = 2;
constexpr int64_t kClusterSlots = 16384;  // of the arena
constexpr int32_t kClusterRows = 16;
constexpr int32_t kFewRows = 32;
constexpr int kMergeBatch = 8;  // parts that a warp has on the way

__device__ __forceinline__ float4 scaled(float4 x, float by) { return {x.x * by, x.y * by, x.z * by, x.w * by}; }
__device__ __forceinline__ void add_scaled(float4& to, float4 x, float by) {
  to.x += by * x.x;
  to.y += by * x.y;
  to.z += by * x.z;
  to.w += by * x.w;
}

/// A row that several workers share: the first and the last of them. Nothing to join where they are the same.
struct SharedRow {
  int32_t row, first, last;
};

/// Row `row`, found from the lengths by all threads of the block while the split kernel still runs.
template <int kWarps>
__device__ __forceinline__ SharedRow find_shared_row(const RaggedRows& rows, int32_t workers, int32_t row) {
  __shared__ int32_t scratch[kWarps];
  int32_t total = 0, before = 0;
  for (int32_t r = threadIdx.x; r < rows.num_rows; r += 32 * kWarps) {
    const int32_t blocks = static_cast<int32_t>(split_blocks(rows.len(r)));
    total += blocks;
    if (r < row) before += blocks;
  }
  const int32_t quota = static_cast<int32_t>(split_quota(block_sum(total, scratch), workers));
  const int32_t begin = block_sum(before, scratch);
  const int32_t blocks = max_of(static_cast<int32_t>(split_blocks(rows.len(row))), 1);
  return {row, begin / quota, (begin + blocks - 1) / quota};
}

/// Rows without tokens belong to no worker; a thread finishes those that it finds.
template <int kWarps>
__device__ __forceinline__ void write_empty_rows(const DecodeAttentionParams& params) {
  const int32_t head = blockIdx.y;
  for (int32_t row = blockIdx.x + threadIdx.x * gridDim.x; row < params.rows.num_rows; row += gridDim.x * 32 * kWarps) {
    if (params.rows.len(row) > 0) continue;
    const int64_t target = static_cast<int64_t>(row) * params.group_size + head;
    for (int32_t channel = 0; channel < params.value_dim; ++channel) {
      store_float(params.out, params.dtype, target * params.value_dim + channel, 0.0f);
    }
    params.lse[target] = -INFINITY;
  }
}

/// Block (x, h) joins head h of one shared row: row x with kByRow, else the row that starts in worker x. Each of kWarps
/// warps takes every kWarps-th part, a lane four channels at a time; the warps' states meet in warp order.
template <int kWarps, bool kByRow>
__global__ void __launch_bounds__(32 * kWarps)
    merge_kernel(const __grid_constant__ DecodeAttentionParams params, const __grid_constant__ DecodeWorkspace work) {
  __shared__ float tops[kWarps], sums[kWarps];
  __shared__ float4 outs[kWarps][kMaxHeadDim / 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
  const int32_t heads = params.group_size, value_dim = params.value_dim;
  SharedRow shared{};
  if constexpr (kByRow) shared = find_shared_row<kWarps>(params.rows, work.workers, blockIdx.x);
  wait_for_previous();
  let_next_start();
  if constexpr (!kByRow) {
    const int32_t worker = blockIdx.x;
    const OpenRow open = work.open[worker];
    shared = open.row < 0 ? SharedRow{0, worker, worker} : SharedRow{open.row, worker, open.last_worker};
  }
  write_empty_rows<kWarps>(params);
  if (shared.first == shared.last) return;
  const int32_t parts = shared.last - shared.first + 1;

  float top = -INFINITY, sum = 0.0f;
  float4 out[kMaxHeadDim / 128] = {};
  for (int32_t first = warp; first < parts; first += kWarps * kMergeBatch) {
    float part_top[kMergeBatch], part_sum[kMergeBatch];
    float4 part_out[kMergeBatch][kMaxHeadDim / 128];
#pragma unroll
    for (int u = 0; u < kMergeBatch; ++u) {
      const int32_t i = first + u * kWarps;
      const bool live = i < parts;
      const float* state = work.partial + partial_index(shared.first + (live ? i : 0), !live || i == 0) * work.stride;
      part_top[u] = live ? state[heads * value_dim + head] : -INFINITY;
      part_sum[u] = live ? state[heads * value_dim + heads + head] : 0.0f;
#pragma unroll
      for (int j = 0; j < kMaxHeadDim / 128; ++j) {
        const int channel = 4 * (lane + 32 * j);
        part_out[u][j] = live && channel < value_dim
                             ? *reinterpret_cast<const float4*>(state + head * value_dim + channel)
                             : float4{};
      }
    }
    float best = top;
#pragma unroll
    for (int u = 0; u < kMergeBatch; ++u) best = fmaxf(best, part_top[u]);
    const float base = finite_or_zero(best), shrink = exp2f(top - base);
    top = best;
    sum *= shrink;
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / 128; ++j) out[j] = scaled(out[j], shrink);
#pragma unroll
    for (int u = 0; u < kMergeBatch; ++u) {
      const float weight = exp2f(part_top[u] - base);
      sum += weight * part_sum[u];
#pragma unroll
      for (int j = 0; j < kMaxHeadDim / 128; ++j) add_scaled(out[j], part_out[u][j], weight);
    }
  }
  if (lane == 0) {
    tops[warp] = top;
    sums[warp] = sum;
  }
#pragma unroll
  for (int j = 0; j < kMaxHeadDim / 128; ++j) outs[warp][lane + 32 * j] = out[j];
  __syncthreads();

#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, tops[w]);
  const float base = finite_or_zero(top);
  float weights[kWarps];
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    weights[w] = exp2f(tops[w] - base);
    sum += weights[w] * sums[w];
  }
  const int64_t target = static_cast<int64_t>(shared.row) * heads + head;
  for (int channel = threadIdx.x; channel < value_dim; channel += 32 * kWarps) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += weights[w] * reinterpret_cast<const float*>(outs[w])[channel];
    store_float(params.out, params.dtype, target * value_dim + channel, normalised(total, sum));
  }
  if (threadIdx.x == 0) params.lse[target] = log_sum_exp(top, sum);
}

template <int kWarps, bool kByRow>
cudaError_t launch_merge(const DecodeAttentionParams& params, const DecodeWorkspace& work, int32_t blocks,
                         cudaStream_t stream) {
  const auto kernel = merge_kernel<kWarps, kByRow>;
  bool early = false;
  if (const cudaError_t err = compiled_for_sm_90(reinterpret_cast<const void*>(kernel), &early); err != cudaSuccess) {
    return err;
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(params.group_size));
  return launch_dependent(kernel, early, grid, 32 * kWarps, 0, stream, params, work);
}

cudaError_t worker_count(int32_t* workers) {
  DeviceInfo info;
  if (const cudaError_t err = device_info(&info); err != cudaSuccess) return err;
  *workers = info.sm_count * kBlocksPerSm;
  return cudaSuccess;
}

cudaError_t launch_split(const DecodeAttentionParams& params, const DecodeWorkspace& work, cudaStream_t stream) {
  switch (params.dtype) {
    case DType::float32:
      return launch_split_fp32(params, work, stream);
    case DType::float16:
      return launch_split_fp16(params, work, stream);
    case DType::bfloat16:
      return launch_split_bf16(params, work, stream);
  }
  return cudaErrorInvalidValue;
}

/// Few rows of few slots do not fill the device for long: what counts is the chain of steps, which is shorter inside a
/// cluster. The bound on the arena bounds what a skewed row costs.
cudaError_t launch_clusters(const DecodeAttentionParams& params, cudaStream_t stream, bool* launched) {
  const int32_t rows = params.rows.num_rows;
  *launched = false;
  if (params.dtype == DType::float32 || params.rows.capacity > kClusterSlots || rows > kClusterRows) return cudaSuccess;
  const int32_t ranks = rows <= kClusterRows / 2 ? kMostRanks : kFewestRanks;
  return params.dtype == DType::float16 ? launch_clusters_fp16(params, ranks, stream, launched)
                                        : launch_clusters_bf16(params, ranks, stream, launched);
}

}  // namespace

cudaError_t decode_attention_workspace_bytes(const DecodeAttentionParams& params, int64_t* bytes) {
  int32_t workers = 0;
  if (const cudaError_t err = worker_count(&workers); err != cudaSuccess) return err;
  DecodeWorkspace unused;
  *bytes = decode_workspace(params, workers, nullptr, &unused);
  return cudaSuccess;
}

cudaError_t decode_attention(const DecodeAttentionParams& params, void* workspace, cudaStream_t stream) {
  if (params.rows.num_rows == 0) return cudaSuccess;
  bool launched = false;
  if (const cudaError_t err = launch_clusters(params, stream, &launched); err != cudaSuccess || launched) return err;
  int32_t workers = 0;
  if (const cudaError_t err = worker_count(&workers); err != cudaSuccess) return err;
  DecodeWorkspace work;
  decode_workspace(params, workers, workspace, &work);
  if (const cudaError_t err = launch_split(params, work, stream); err != cudaSuccess) return err;
  // Few rows have many parts each, many rows few.
  return params.rows.num_rows <= kFewRows ? launch_merge<16, true>(params, work, params.rows.num_rows, stream)
                                          : launch_merge<4, false>(params, work, workers, stream);
}

}  // namespace uncomp::kernels
