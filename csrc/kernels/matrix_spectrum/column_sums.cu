// SPDX-License-Identifier: Apache-2.0
// Channel sums of token ranges. A block sums one range of one head in float32: a thread keeps 8 channels of every
// n-th token, then the threads of a channel are added in order.
#include "kernels/common/dependent.cuh"
#include "kernels/matrix_spectrum/rows.cuh"
#include "kernels/matrix_spectrum/stages.h"

namespace uncomp::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // tokens that a thread loads before it adds them

template <bool kWide>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(const __grid_constant__ MatrixSpectrumParams params,
                                                               int32_t first_matrix, int32_t tile, float* sums) {
  __shared__ __align__(16) float shared[kThreads * kLaneChannels];  // [rows, tile]
  let_next_start();
  const int lanes = tile / kLaneChannels, rows = kThreads / lanes;
  const int lane = threadIdx.x % lanes, row = threadIdx.x / lanes;
  const int32_t matrix = first_matrix + blockIdx.y, sequence = matrix / params.heads;
  const char* base = head_base<kWide>(params, matrix, params.tokens.begin(sequence));
  const int64_t token_bytes = params.strides.token * (kWide ? 4 : 2);
  const TokenRange range = chunk_range(params.tokens.count(sequence), gridDim.x, 1, blockIdx.x);
  const bool bfloat = params.dtype == DType::bfloat16;

  float sum[kLaneChannels] = {};
  for (int64_t token = range.begin + row; token < range.end; token += kInFlight * rows) {
    RawChannels<kWide> raw[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t t = token + u * rows;
      raw[u] =
          load_channels<kWide>(base + t * token_bytes, lane * kLaneChannels, params.dim, params.vectors, t < range.end);
    }
    // Loaded tokens are added among themselves first: a quarter of the rounding steps at the running sum.
    float few[kLaneChannels] = {};
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      float x[kLaneChannels];
      unpack_channels<kWide>(raw[u], bfloat, x);
#pragma unroll
      for (int j = 0; j < kLaneChannels; ++j) few[j] += x[j];
    }
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) sum[j] += few[j];
  }
  float4* mine = reinterpret_cast<float4*>(shared + row * tile + lane * kLaneChannels);
  mine[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  mine[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  __syncthreads();
  if (threadIdx.x < tile) {
    float total = 0.0f;
    for (int r = 0; r < rows; ++r) total += shared[r * tile + threadIdx.x];
    sums[(static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * tile + threadIdx.x] = total;
  }
}

}  // namespace

cudaError_t column_sums(const MatrixSpectrumParams& params, const SpectrumPlan& plan, HeadGroup group, float* sums,
                        cudaStream_t stream) {
  const dim3 grid(plan.sum_chunks, group.count);
  if (params.dtype == DType::float32) {
    column_sums_kernel<true><<<grid, kThreads, 0, stream>>>(params, group.first, plan.tile, sums);
  } else {
    column_sums_kernel<false><<<grid, kThreads, 0, stream>>>(params, group.first, plan.tile, sums);
  }
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
