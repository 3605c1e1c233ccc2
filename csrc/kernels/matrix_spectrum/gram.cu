// SPDX-License-Identifier: Apache-2.0
// Gram matrices of centred unit tokens. A block takes one token range of one head: tokens go from registers (where the
// next tile is in flight) through mean, length and scale into a half-precision tile in shared memory, and from there
// through tensor cores into float32 registers. Z carries a factor of 16 that keeps it away from the subnormal range.
// float32 states, and heads with few tokens, are split into a high and a low half-precision part, multiplied as
// hh + hl + lh.
#include "kernels/common/mma.cuh"
#include "kernels/matrix_spectrum/rows.cuh"
#include "kernels/matrix_spectrum/stages.h"
#include "kernels/matrix_spectrum/unit_token.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

template <int kTile, bool kWide>
struct GramShape {
  using Plan = GramPlan<kTile>;
  static constexpr int kLanes = kTile / kLaneChannels;                      // threads that share a token
  static constexpr int kRows = Plan::kThreads / kLanes;                     // tokens of one pass: 16
  static constexpr int kPasses = (kWide ? 2 : 4) / (kTile == 256 ? 2 : 1);  // registers are short there
  static constexpr int kTokens = kRows * kPasses;                           // tokens of a tile
  static constexpr int kParts = 2;                                          // high, low
  static constexpr int kPartHalves = kTokens * kTile;
  static constexpr int kBufferHalves = kPartHalves * kParts;
  static constexpr int kSharedBytes = 2 * kBufferHalves * 2 + 3 * kTile * 4;  // two buffers, sums, mean
  static_assert(kRows == 16 && kSharedBytes <= 99 * 1024);
};

/// First half of 8 channels of a token in a tile. The pieces of 16 bytes are permuted within groups of 8 so that 8
/// tokens of one piece, and 8 pieces of one token, lie in different banks.
template <int kTile>
__device__ __forceinline__ int piece_offset(int token, int piece) {
  return token * kTile + ((piece ^ (token & 7)) * 8);
}

/// Centred, scaled to length 16, or zeros. `near_mean` as above; lanes of a token are neighbours, kLanes of them.
template <int kLanes>
__device__ __forceinline__ void unit_token(float (&d)[kLaneChannels], float near_mean, bool live) {
  const auto length_square = [&] {
    float square = 0.0f;
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) square += d[j] * d[j];
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset >>= 1) square += __shfl_xor_sync(kFullWarp, square, offset);
    return square;
  };
  float square = length_square();
  const bool extreme = live && extreme_square(square);
  if (__any_sync(kFullWarp, extreme)) {
    if (extreme) {
      const float scale = square < 1.0f ? kUp : kDown;
#pragma unroll
      for (int j = 0; j < kLaneChannels; ++j) d[j] *= scale;
      near_mean *= scale;
    }
    square = length_square();
  }
  const float inverse = rsqrtf(square);
  const bool zero = !live || square == 0.0f || square * inverse <= near_mean;
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) d[j] = zero ? 0.0f : d[j] * inverse * kUnitLength;
}

template <int kTile, bool kWide>
__global__ void __launch_bounds__(GramPlan<kTile>::kThreads, 256 / kTile)
    gram_kernel(const __grid_constant__ MatrixSpectrumParams params, int32_t first_matrix, int32_t sum_chunks,
                const float* sums, float4* partial) {
  using Shape = GramShape<kTile, kWide>;
  using Plan = GramPlan<kTile>;
  extern __shared__ __align__(128) unsigned char shared[];
  __half* z = reinterpret_cast<__half*>(shared);                             // [2, parts, tokens, tile]
  float* half_sum = reinterpret_cast<float*>(z + 2 * Shape::kBufferHalves);  // [2, tile]
  float* mean = half_sum + 2 * kTile;                                        // [tile]
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int32_t matrix = first_matrix + blockIdx.y, sequence = matrix / params.heads;
  const int32_t count = params.tokens.count(sequence);

  // Mean: two threads a channel add the sums of all ranges in order.
  {
    const int part = thread / kTile, channel = thread % kTile;
    const int middle = sum_chunks / 2, end = part == 0 ? middle : sum_chunks;
    const float* from = sums + static_cast<int64_t>(blockIdx.y) * sum_chunks * kTile + channel;
    float total = 0.0f;
#pragma unroll 8
    for (int c = part == 0 ? 0 : middle; c < end; ++c) total += from[c * kTile];
    half_sum[part * kTile + channel] = total;
    __syncthreads();
    if (part == 0) mean[channel] = (half_sum[channel] + half_sum[kTile + channel]) / static_cast<float>(count);
    __syncthreads();
  }
  const int group_lane = thread % Shape::kLanes, row = thread / Shape::kLanes;
  const float near_mean = near_mean_length<kTile>(mean, lane);

  const int64_t token_bytes = params.strides.token * (kWide ? 4 : 2);
  const TokenRange range = chunk_range(count, gridDim.x, Shape::kTokens, blockIdx.x);
  const uint32_t length = range.end - range.begin;
  const bool bfloat = params.dtype == DType::bfloat16;
  const bool split = kWide || count <= kFewTokens;
  const char* next =
      head_base<kWide>(params, matrix, params.tokens.begin(sequence)) + (range.begin + row) * token_bytes;
  RawChannels<kWide> raw[Shape::kPasses];
  const auto fetch = [&](uint32_t begin) {
#pragma unroll
    for (int p = 0; p < Shape::kPasses; ++p) {
      raw[p] = load_channels<kWide>(next, group_lane * kLaneChannels, params.dim, params.vectors,
                                    begin + p * Shape::kRows + row < length);
      next += Shape::kRows * token_bytes;
    }
  };

  float acc[Plan::kSlots][2][4] = {};
  fetch(0);
  int buffer = 0;
  for (uint32_t begin = 0; begin < length; begin += Shape::kTokens, buffer ^= 1) {
    // Registers to unit tokens in shared memory.
    __half* tile = z + buffer * Shape::kBufferHalves;
#pragma unroll
    for (int p = 0; p < Shape::kPasses; ++p) {
      float d[kLaneChannels];
      unpack_channels<kWide>(raw[p], bfloat, d);
#pragma unroll
      for (int j = 0; j < kLaneChannels; ++j) d[j] -= mean[group_lane * kLaneChannels + j];
      const int token = p * Shape::kRows + row;
      unit_token<Shape::kLanes>(d, near_mean, begin + token < length);
      uint4 high;
      high.x = pack2<__half>(d[0], d[1]);
      high.y = pack2<__half>(d[2], d[3]);
      high.z = pack2<__half>(d[4], d[5]);
      high.w = pack2<__half>(d[6], d[7]);
      *reinterpret_cast<uint4*>(tile + piece_offset<kTile>(token, group_lane)) = high;
      if (split) {
        float rest[kLaneChannels];
#pragma unroll
        for (int j = 0; j < kLaneChannels; ++j) rest[j] = d[j] - __half2float(__float2half_rn(d[j]));
        uint4 low;
        low.x = pack2<__half>(rest[0], rest[1]);
        low.y = pack2<__half>(rest[2], rest[3]);
        low.z = pack2<__half>(rest[4], rest[5]);
        low.w = pack2<__half>(rest[6], rest[7]);
        *reinterpret_cast<uint4*>(tile + Shape::kPartHalves + piece_offset<kTile>(token, group_lane)) = low;
      }
    }
    fetch(begin + Shape::kTokens);
    // One barrier a tile: whoever overwrites a buffer has passed the barrier behind its last use.
    __syncthreads();

    // A fragment of 16 channels x 16 tokens, read transposed. Its registers are the left operand of a row block, and
    // {0, 2} and {1, 3} are the right operands of the two column halves.
    const auto fragment = [&](uint32_t(&f)[4], const __half* part, int block, int step) {
      const int token = step * 16 + lane / 16 * 8 + lane % 8;
      ldmatrix_x4_trans(f, part + piece_offset<kTile>(token, 2 * block + lane / 8 % 2));
    };
    const auto multiply = [&](const __half* left, const __half* right) {
#pragma unroll(kTile == 256 ? 1 : Shape::kTokens / 16)
      for (int step = 0; step < Shape::kTokens / 16; ++step) {
        uint32_t row_block[4], column[4];
#pragma unroll
        for (int slot = 0; slot < Plan::kSlots; ++slot) {
          if (slot + 1 == Plan::kSlots && warp % 2 != 0) continue;
          if (slot == 0 || slot == Plan::split(warp)) fragment(row_block, left, Plan::block_row(warp, slot), step);
          fragment(column, right, Plan::block_column(warp, slot), step);
          const uint32_t low[2] = {column[0], column[2]}, high[2] = {column[1], column[3]};
          mma_16x8x16<__half>(acc[slot][0], row_block, low);
          mma_16x8x16<__half>(acc[slot][1], row_block, high);
        }
      }
    };
    const __half* low_part = tile + Shape::kPartHalves;
#pragma unroll 1
    for (int product = 0; product < (split ? 3 : 1); ++product) {
      multiply(product == 2 ? low_part : tile, product == 1 ? low_part : tile);
    }
  }

  float4* to = partial + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * Plan::kVectors + thread;
#pragma unroll
  for (int slot = 0; slot < Plan::kSlots; ++slot) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float(&c)[4] = acc[slot][j];
      to[(2 * slot + j) * Plan::kThreads] = make_float4(c[0], c[1], c[2], c[3]);
    }
  }
}

constexpr int kReduceThreads = 256;

/// Adds the partial matrices of a head in order, one fragment vector a thread, and writes both triangles.
template <int kTile>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_gram_kernel(const float4* partial, int32_t chunks, int32_t first_matrix, float* gram) {
  using Plan = GramPlan<kTile>;
  static_assert(Plan::kVectors % kReduceThreads == 0);
  const int vector = blockIdx.x * kReduceThreads + threadIdx.x;
  const int thread = vector % Plan::kThreads, warp = thread / 32, lane = thread % 32;
  const int slot = vector / Plan::kThreads / 2, half = vector / Plan::kThreads % 2;
  if (slot >= Plan::slots(warp)) return;
  const float4* from = partial + static_cast<int64_t>(blockIdx.y) * chunks * Plan::kVectors + vector;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int c = 0; c < chunks; ++c) {
    const float4 x = from[static_cast<int64_t>(c) * Plan::kVectors];
    sum.x += x.x;
    sum.y += x.y;
    sum.z += x.z;
    sum.w += x.w;
  }
  float* to = gram + static_cast<int64_t>(first_matrix + blockIdx.y) * kTile * kTile;
  const int row = Plan::block_row(warp, slot) * 16 + lane / 4;
  const int column = Plan::block_column(warp, slot) * 16 + half * 8 + lane % 4 * 2;
  const auto put = [&](int r, int c, float x) {
    if (c > r) return;
    to[r * kTile + c] = x;
    to[c * kTile + r] = x;
  };
  put(row, column, sum.x);
  put(row, column + 1, sum.y);
  put(row + 8, column, sum.z);
  put(row + 8, column + 1, sum.w);
}

template <int kTile, bool kWide>
cudaError_t launch(const MatrixSpectrumParams& params, const SpectrumPlan& plan, HeadGroup group, const float* sums,
                   float4* partial, float* gram, cudaStream_t stream) {
  using Plan = GramPlan<kTile>;
  constexpr int kShared = GramShape<kTile, kWide>::kSharedBytes;
  const auto kernel = gram_kernel<kTile, kWide>;
  if (const cudaError_t err = allow_shared_memory(reinterpret_cast<const void*>(kernel), kShared); err != cudaSuccess) {
    return err;
  }
  const dim3 grid(plan.gram_chunks, group.count);
  kernel<<<grid, Plan::kThreads, kShared, stream>>>(params, group.first, plan.sum_chunks, sums, partial);
  if (const cudaError_t err = cudaGetLastError(); err != cudaSuccess) return err;
  const dim3 reduce_grid(Plan::kVectors / kReduceThreads, group.count);
  reduce_gram_kernel<kTile><<<reduce_grid, kReduceThreads, 0, stream>>>(partial, plan.gram_chunks, group.first, gram);
  return cudaGetLastError();
}

}  // namespace

cudaError_t gram_matrices(const MatrixSpectrumParams& params, const SpectrumPlan& plan, HeadGroup group,
                          const float* sums, float4* partial, float* gram, cudaStream_t stream) {
  const bool wide = params.dtype == DType::float32;
  switch (plan.tile) {
    case 64:
      return wide ? launch<64, true>(params, plan, group, sums, partial, gram, stream)
                  : launch<64, false>(params, plan, group, sums, partial, gram, stream);
    case 128:
      return wide ? launch<128, true>(params, plan, group, sums, partial, gram, stream)
                  : launch<128, false>(params, plan, group, sums, partial, gram, stream);
    case 256:
      return wide ? launch<256, true>(params, plan, group, sums, partial, gram, stream)
                  : launch<256, false>(params, plan, group, sums, partial, gram, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace uncomp::kernels
