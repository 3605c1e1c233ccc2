// SPDX-License-Identifier: Apache-2.0
// Gram matrices of heads of few tokens on sm_90a: a block keeps a head in shared memory, so one launch reads it once,
// finds its mean, makes unit tokens in place and multiplies them as high and low half-precision parts (hh + hl + lh).
#include "kernels/common/dependent.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/matrix_spectrum/ring.cuh"
#include "kernels/matrix_spectrum/stages.h"
#include "kernels/matrix_spectrum/stream_tile.cuh"
#include "kernels/matrix_spectrum/wgmma.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

/// A block has a warpgroup for every 64 channels; kPass tokens meet all of its threads, 8 channels each.
template <int kTile>
struct SmallShape {
  static constexpr int kPanels = kTile / 64, kThreads = kPanels * kGroupThreads, kWarps = kThreads / 32;
  static constexpr int kLanes = kTile / kLaneChannels, kPass = kThreads / kLanes;
  static constexpr int kPitch = kTile + 4;  // of the matrix on its way out, in float32 words
  static_assert(kPass == 16);

  /// Shared memory: both parts of the tokens, of which the matrix takes the place in the end; sums of warps, mean.
  static constexpr int part_bytes(int tile_tokens) { return tile_tokens * kTile * 2; }
  static constexpr int sums_at(int tile_tokens) { return max_of(2 * part_bytes(tile_tokens), kTile * kPitch * 4); }
  static constexpr int shared_bytes(int tile_tokens) { return sums_at(tile_tokens) + (kWarps + 1) * kTile * 4; }
};

/// Centred tokens to length 16, or zeros; kLanes neighbouring threads share one.
template <int kLanes>
__device__ __forceinline__ void unit_token(float (&d)[kLaneChannels], float near_mean, bool live) {
  const auto length_square = [&] {
    float square = 0.0f;
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) square += d[j] * d[j];
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) square += __shfl_xor_sync(kFullWarp, square, offset);
    return square;
  };
  float square = length_square();
  const bool extreme = live && extreme_square(square);
  if (__any_sync(kFullWarp, extreme)) {
    const float scale = !extreme ? 1.0f : (square < 1.0f ? kUp : kDown);
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) d[j] *= scale;
    near_mean *= scale;
    square = length_square();
  }
  const float inverse = rsqrtf(square);
  const float factor = !live || square == 0.0f || square * inverse <= near_mean ? 0.0f : inverse * kUnitLength;
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) d[j] *= factor;
}

template <int kTile, bool kBfloat>
__global__ void __launch_bounds__(SmallShape<kTile>::kThreads, 2)
    small_gram_kernel(const __grid_constant__ MatrixSpectrumParams params, int32_t tile_tokens, float* gram) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = SmallShape<kTile>;
  extern __shared__ __align__(1024) unsigned char shared[];
  let_next_start();
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp = __shfl_sync(kFullWarp, thread / 32, 0);  // the compiler sees that warps do not diverge
  const int group_lane = thread % S::kLanes, row = thread / S::kLanes, channel = group_lane * kLaneChannels;
  const int32_t matrix = blockIdx.x, sequence = matrix / params.heads;
  const int32_t count = min_of(params.tokens.count(sequence), tile_tokens);
  const int steps = ceil_div(count, S::kPass);
  const uint32_t panel_bytes = tile_tokens * 128, part_bytes = S::part_bytes(tile_tokens);
  const uint32_t high = shared_address(shared), low = high + part_bytes;
  float* sums = reinterpret_cast<float*>(shared + S::sums_at(tile_tokens));  // [warps, tile]
  float* mean = sums + S::kWarps * kTile;

  // A thread meets the same places of every pass from here to the unit tokens.
  const uint32_t mine = group_lane / 8 * panel_bytes + row * 128 + ((group_lane ^ row) & 7) * 16;
  {
    const int64_t token_bytes = params.strides.token * 2;
    const char* from =
        head_base<false>(params, matrix, params.tokens.begin(sequence)) + row * token_bytes + channel * 2;
    for (int step = 0; step < steps; ++step) {
      ring_copy16(high + mine + step * 2048, from, step * S::kPass + row < count && channel < params.dim);
      from += S::kPass * token_bytes;
    }
    cp_async_commit();
    cp_async_wait<0>();
  }
  float sum[kLaneChannels] = {};
#pragma unroll 4
  for (int step = 0; step < steps; ++step) {
    float x[kLaneChannels];
    load_chunk<kBfloat>(high + mine + step * 2048, x);
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) sum[j] += x[j];
  }
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) {
#pragma unroll
    for (int offset = 16; offset >= S::kLanes; offset /= 2) sum[j] += __shfl_xor_sync(kFullWarp, sum[j], offset);
  }
  if (lane < S::kLanes) {
    float4* to = reinterpret_cast<float4*>(sums + warp * kTile + channel);
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  }
  __syncthreads();
  if (thread < kTile) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) total += sums[w * kTile + thread];
    mean[thread] = total / static_cast<float>(count);
  }
  __syncthreads();

  const float near_mean = near_mean_length<kTile>(mean, lane);
  float centre[kLaneChannels];
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) centre[j] = mean[channel + j];
#pragma unroll 3
  for (int step = 0; step < steps; ++step) {
    const uint32_t place = mine + step * 2048;
    float d[kLaneChannels];
    load_chunk<kBfloat>(high + place, d);
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) d[j] -= centre[j];
    unit_token<S::kLanes>(d, near_mean, step * S::kPass + row < count);
    store_chunk(high + place, pack(d));
    float rest[kLaneChannels];
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) rest[j] = d[j] - __half2float(__float2half_rn(d[j]));
    store_chunk(low + place, pack(rest));
  }
  wgmma_publish();
  __syncthreads();

  // The last warpgroup has the upper 64 rows of the lower triangle, the one before it the others.
  const uint64_t high_part = columns_operand(high, panel_bytes), low_part = columns_operand(low, panel_bytes);
  const bool last = warp / (kGroupThreads / 32) == S::kPanels - 1;
  const auto multiply = [&](const auto& add, uint32_t left_offset) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t right = step * (2048 >> 4), left = right + (left_offset >> 4);
      wgmma_fence();
      add(high_part + left, high_part + right);
      add(high_part + left, low_part + right);
      add(low_part + left, high_part + right);
      wgmma_commit();
    }
    wgmma_wait<0>();
  };
  float top[32] = {}, bottom[kTile == 64 ? 1 : 64] = {};
  if (last) {
    multiply([&](uint64_t left, uint64_t right) { wgmma_64x64x16(top, left, right); }, 0);
    wgmma_settle(top);
  } else if constexpr (kTile == 128) {
    multiply([&](uint64_t left, uint64_t right) { wgmma_64x128x16(bottom, left, right); }, panel_bytes);
    wgmma_settle(bottom);
  }
  __syncthreads();
  float* square = reinterpret_cast<float*>(shared);
  const int of = thread % kGroupThreads;
  const auto put = [&](int v, const float* c) {
    put_fragment<kTile, S::kPitch>(square, v, of, make_float4(c[0], c[1], c[2], c[3]));
  };
  if (last) {
#pragma unroll
    for (int v = 0; v < 8; ++v) put(v, top + 4 * v);
  } else if constexpr (kTile == 128) {
#pragma unroll
    for (int v = 0; v < 16; ++v) put(8 + v, bottom + 4 * v);
  }
  __syncthreads();
  float4* to = reinterpret_cast<float4*>(gram + static_cast<int64_t>(matrix) * kTile * kTile);
#pragma unroll 4
  for (int i = thread; i < kTile * kTile / 4; i += S::kThreads) {
    to[i] = *reinterpret_cast<const float4*>(square + i / (kTile / 4) * S::kPitch + i % (kTile / 4) * 4);
  }
#endif
}

template <int kTile>
cudaError_t launch(const MatrixSpectrumParams& params, int32_t tile_tokens, float* gram, cudaStream_t stream) {
  using S = SmallShape<kTile>;
  const auto kernel =
      params.dtype == DType::bfloat16 ? small_gram_kernel<kTile, true> : small_gram_kernel<kTile, false>;
  const int shared = S::shared_bytes(tile_tokens);
  if (const cudaError_t err = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared); err != cudaSuccess) {
    return err;
  }
  const unsigned matrices = static_cast<unsigned>(params.batch) * params.heads;
  kernel<<<matrices, S::kThreads, shared, stream>>>(params, tile_tokens, gram);
  return cudaGetLastError();
}

}  // namespace

cudaError_t small_gram(const MatrixSpectrumParams& params, const SpectrumPlan& plan, float* gram, cudaStream_t stream) {
  return plan.tile == 64 ? launch<64>(params, plan.tile_tokens, gram, stream)
                         : launch<128>(params, plan.tile_tokens, gram, stream);
}

}  // namespace uncomp::kernels
