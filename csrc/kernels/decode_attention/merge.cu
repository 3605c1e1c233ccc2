// SPDX-License-Identifier: Apache-2.0
// decode_attention: two launches. The split kernel leaves the parts of shared rows, the merge kernel joins them in
// worker order; the border between the launches is the barrier.
#include "core/constants.h"
#include "core/splits.h"
#include "kernels/common/dependent.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/types.cuh"
#include "kernels/decode_attention/latent_shapes.h"
#include "kernels/decode_attention/workspace.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kBlocksPerSm = 2;
constexpr int64_t kClusterSlots = 16384;  // of the arena
constexpr int32_t kClusterRows = 16;
constexpr int32_t kFewRows = 32;
constexpr int kMergeBatch = 5;  // parts that a lane has on the way

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
__device__ __forceinline__ SharedRow find_shared_row(const RaggedRows& rows, int32_t workers, int32_t lead,
                                                     int32_t row) {
  __shared__ int32_t scratch[kWarps];
  int32_t total = 0, before = 0;
  for (int32_t r = threadIdx.x; r < rows.num_rows; r += 32 * kWarps) {
    const int32_t blocks = static_cast<int32_t>(split_blocks(rows.len(r), lead));
    total += blocks;
    if (r < row) before += blocks;
  }
  const int32_t quota = static_cast<int32_t>(split_quota(block_sum(total, scratch), workers));
  const int32_t begin = block_sum(before, scratch);
  const int32_t blocks = max_of(static_cast<int32_t>(split_blocks(rows.len(row), lead)), 1);
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

/// Block (x, h, z) joins channels 4 kLanes z and on of head h of one shared row: row x with kByRow, else the row that
/// starts in worker x. kLanes lanes take a part, four channels each, so a warp takes several parts side by side; the
/// states of a warp's parts meet by shuffles, those of the warps in warp order.
template <int kWarps, int kLanes, bool kByRow>
__global__ void __launch_bounds__(32 * kWarps)
    merge_kernel(const __grid_constant__ DecodeAttentionParams params, const __grid_constant__ DecodeWorkspace work) {
  constexpr int kAcross = 32 / kLanes, kAtOnce = kWarps * kAcross;  // parts
  __shared__ float tops[kWarps], sums[kWarps];
  __shared__ float4 outs[kWarps][kLanes];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
  const int32_t heads = params.group_size, value_dim = params.value_dim;
  SharedRow shared{};
  if constexpr (kByRow) shared = find_shared_row<kWarps>(params.rows, work.workers, work.lead, blockIdx.x);
  wait_for_previous();
  let_next_start();
  if constexpr (!kByRow) {
    const int32_t worker = blockIdx.x;
    const OpenRow open = work.open[worker];
    shared = open.row < 0 ? SharedRow{0, worker, worker} : SharedRow{open.row, worker, open.last_worker};
  }
  if (blockIdx.z == 0) write_empty_rows<kWarps>(params);
  if (shared.first == shared.last) return;
  const int32_t parts = shared.last - shared.first + 1, channel = 4 * (kLanes * blockIdx.z + lane % kLanes);

  float top = -INFINITY, sum = 0.0f;
  float4 out{};
  for (int32_t first = warp * kAcross + lane / kLanes; first < parts; first += kAtOnce * kMergeBatch) {
    float part_top[kMergeBatch], part_sum[kMergeBatch];
    float4 part_out[kMergeBatch];
#pragma unroll
    for (int u = 0; u < kMergeBatch; ++u) {
      const int32_t i = first + u * kAtOnce;
      const bool live = i < parts;
      const float* state = work.partial + partial_index(shared.first + i, i == 0) * work.stride;
      part_top[u] = live ? state[heads * value_dim + head] : -INFINITY;
      part_sum[u] = live ? state[heads * value_dim + heads + head] : 0.0f;
      part_out[u] =
          live && channel < value_dim ? *reinterpret_cast<const float4*>(state + head * value_dim + channel) : float4{};
    }
    float best = top;
#pragma unroll
    for (int u = 0; u < kMergeBatch; ++u) best = fmaxf(best, part_top[u]);
    const float base = finite_or_zero(best), shrink = exp2f(top - base);
    top = best;
    sum *= shrink;
    out = scaled(out, shrink);
#pragma unroll
    for (int u = 0; u < kMergeBatch; ++u) {
      const float weight = exp2f(part_top[u] - base);
      sum += weight * part_sum[u];
      add_scaled(out, part_out[u], weight);
    }
  }
  if constexpr (kAcross > 1) {
    float best = top;
#pragma unroll
    for (int lanes = kLanes; lanes < 32; lanes *= 2) best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, lanes));
    const float shrink = exp2f(top - finite_or_zero(best));
    top = best;
    sum *= shrink;
    out = scaled(out, shrink);
#pragma unroll
    for (int lanes = kLanes; lanes < 32; lanes *= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, lanes);
      const float4 other{__shfl_xor_sync(kFullWarp, out.x, lanes), __shfl_xor_sync(kFullWarp, out.y, lanes),
                         __shfl_xor_sync(kFullWarp, out.z, lanes), __shfl_xor_sync(kFullWarp, out.w, lanes)};
      add_scaled(out, other, 1.0f);
    }
  }
  if (lane == 0) {
    tops[warp] = top;
    sums[warp] = sum;
  }
  if (lane < kLanes) outs[warp][lane] = out;
  __syncthreads();

  if (warp > 0 || lane >= kLanes || channel >= value_dim) return;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, tops[w]);
  const float base = finite_or_zero(top);
  float4 total{};
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float weight = exp2f(tops[w] - base);
    sum += weight * sums[w];
    add_scaled(total, outs[w][lane], weight);
  }
  const int64_t target = static_cast<int64_t>(shared.row) * heads + head;
  const float channels[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    store_float(params.out, params.dtype, target * value_dim + channel + i, normalised(channels[i], sum));
  }
  if (channel == 0) params.lse[target] = log_sum_exp(top, sum);
}

template <int kWarps, int kLanes, bool kByRow>
cudaError_t launch_merge(const DecodeAttentionParams& params, const DecodeWorkspace& work, int32_t blocks,
                         cudaStream_t stream) {
  const auto kernel = merge_kernel<kWarps, kLanes, kByRow>;
  bool early = false;
  if (const cudaError_t err = compiled_for_sm_90(reinterpret_cast<const void*>(kernel), &early); err != cudaSuccess) {
    return err;
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(params.group_size),
                  static_cast<unsigned>(ceil_div(params.value_dim, 4 * kLanes)));
  return launch_dependent(kernel, early, grid, 32 * kWarps, 0, stream, params, work);
}

cudaError_t worker_count(const DecodeAttentionParams& params, const KeyTransformParams* transform, int32_t* workers) {
  DeviceInfo info;
  if (const cudaError_t err = device_info(&info); err != cudaSuccess) return err;
  int32_t blocks = kBlocksPerSm;
  if (transform != nullptr) {
    const LatentTile tile = latent_tile(params.key_dim, params.value_dim, params.group_size);
    blocks = latent_blocks(
        params.dtype == DType::float32
            ? tile
            : attention_tile(params.key_dim, params.value_dim, params.group_size, transform->dim, info.smem_per_block));
  }
  *workers = info.sm_count * blocks;
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

cudaError_t launch_latents(const DecodeAttentionParams& params, const KeyTransformParams& transform,
                           const DecodeWorkspace& work, cudaStream_t stream) {
  switch (params.dtype) {
    case DType::float32:
      return launch_latents_fp32(params, transform, work, stream);
    case DType::float16:
      return launch_latents_fp16(params, transform, work, stream);
    case DType::bfloat16:
      return launch_latents_bf16(params, transform, work, stream);
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

cudaError_t decode_attention_workspace_bytes(const DecodeAttentionParams& params, int64_t* bytes,
                                             const KeyTransformParams* transform) {
  int32_t workers = 0;
  if (const cudaError_t err = worker_count(params, transform, &workers); err != cudaSuccess) return err;
  DecodeWorkspace unused;
  *bytes = decode_workspace(params, workers, nullptr, &unused);
  return cudaSuccess;
}

cudaError_t decode_attention(const DecodeAttentionParams& params, void* workspace, cudaStream_t stream,
                             const KeyTransformParams* transform) {
  if (params.rows.num_rows == 0) return cudaSuccess;
  bool launched = false;
  if (transform == nullptr) {
    if (const cudaError_t err = launch_clusters(params, stream, &launched); err != cudaSuccess || launched) return err;
  }
  int32_t workers = 0;
  if (const cudaError_t err = worker_count(params, transform, &workers); err != cudaSuccess) return err;
  DecodeWorkspace work;
  decode_workspace(params, workers, workspace, &work);
  if (transform != nullptr && params.dtype != DType::float32) work.lead = kLatentLead;
  const cudaError_t split =
      transform == nullptr ? launch_split(params, work, stream) : launch_latents(params, *transform, work, stream);
  if (split != cudaSuccess) return split;
  // Few rows have many parts each, many rows few. The blocks are small enough to be there while the split kernel runs.
  return params.rows.num_rows <= kFewRows ? launch_merge<8, 8, true>(params, work, params.rows.num_rows, stream)
                                          : launch_merge<4, 32, false>(params, work, workers, stream);
}

}  // namespace uncomp::kernels
