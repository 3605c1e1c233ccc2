// SPDX-License-Identifier: Apache-2.0
// decode_attention: two launches. The split kernel leaves the parts of shared rows, the merge kernel joins them in
// worker order; the border between the launches is the barrier.
#include "core/constants.h"
#include "kernels/common/types.cuh"
#include "kernels/decode_attention/slice.cuh"
#include "kernels/decode_attention/workspace.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kBlocksPerSm = 2;
constexpr int kMergeWarps = 8;

/// Block (w, h) joins head h of the row that worker w opened, if any. Each warp sums every eighth part, a lane four
/// channels at a time; the warps' sums meet in warp order.
__global__ void __launch_bounds__(32 * kMergeWarps)
    merge_kernel(const __grid_constant__ DecodeAttentionParams params, const __grid_constant__ DecodeWorkspace work) {
  const OpenRow open = work.open[blockIdx.x];
  if (open.row < 0) return;
  __shared__ float tops[kMergeWarps], sums[kMergeWarps];
  __shared__ float4 outs[kMergeWarps][kMaxHeadDim / 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
  const int32_t heads = params.group_size, value_dim = params.value_dim, first = blockIdx.x;
  const int32_t parts = open.last_worker - first + 1;
  const auto part = [&](int32_t i) { return work.partial + partial_index(first + i, i == 0) * work.stride; };

  float top = -INFINITY;
  for (int32_t i = threadIdx.x; i < parts; i += 32 * kMergeWarps) {
    top = fmaxf(top, part(i)[heads * value_dim + head]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
  if (lane == 0) tops[warp] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kMergeWarps; ++w) top = fmaxf(top, tops[w]);
  const float base = finite_or_zero(top);

  float sum = 0.0f;
  float4 out[kMaxHeadDim / 128] = {};
#pragma unroll 4
  for (int32_t i = warp; i < parts; i += kMergeWarps) {
    const float* state = part(i);
    const float weight = exp2f(state[heads * value_dim + head] - base);
    sum += weight * state[heads * value_dim + heads + head];
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / 128; ++j) {
      const int channel = 4 * (lane + 32 * j);
      if (channel < value_dim) {
        const float4 x = *reinterpret_cast<const float4*>(state + head * value_dim + channel);
        out[j].x += weight * x.x;
        out[j].y += weight * x.y;
        out[j].z += weight * x.z;
        out[j].w += weight * x.w;
      }
    }
  }
  if (lane == 0) sums[warp] = sum;
#pragma unroll
  for (int j = 0; j < kMaxHeadDim / 128; ++j) outs[warp][lane + 32 * j] = out[j];
  __syncthreads();

  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kMergeWarps; ++w) sum += sums[w];
  const int64_t target = static_cast<int64_t>(open.row) * heads + head;
  for (int channel = threadIdx.x; channel < value_dim; channel += 32 * kMergeWarps) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kMergeWarps; ++w) total += reinterpret_cast<const float*>(outs[w])[channel];
    store_float(params.out, params.dtype, target * value_dim + channel, normalised(total, sum));
  }
  if (threadIdx.x == 0) params.lse[target] = log_sum_exp(top, sum);
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
  int32_t workers = 0;
  if (const cudaError_t err = worker_count(&workers); err != cudaSuccess) return err;
  DecodeWorkspace work;
  decode_workspace(params, workers, workspace, &work);
  if (const cudaError_t err = launch_split(params, work, stream); err != cudaSuccess) return err;
  const dim3 grid(workers, params.group_size);
  merge_kernel<<<grid, 32 * kMergeWarps, 0, stream>>>(params, work);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
