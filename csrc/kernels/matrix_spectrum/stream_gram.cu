// SPDX-License-Identifier: Apache-2.0
// Gram matrices of centred unit tokens on sm_90a. The tokens of all heads form one line that the blocks share equally,
// so a block works on one head or on pieces of several. One warpgroup copies tiles of tokens into a ring; the others
// turn a tile into unit tokens in place and multiply it from there while they make the next one.
#include "kernels/common/dependent.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/matrix_spectrum/stages.h"
#include "kernels/matrix_spectrum/stream_copy.cuh"
#include "kernels/matrix_spectrum/stream_tile.cuh"
#include "kernels/matrix_spectrum/wgmma.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

template <int kTile, bool kBfloat>
__global__ void __launch_bounds__(kThreads, 1)
    stream_gram_kernel(const __grid_constant__ MatrixSpectrumParams params, int32_t head_tiles, int32_t sum_chunks,
                       const float* sums, float4* partial, float* gram) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = StreamShape<kTile>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int thread = threadIdx.x, lane = thread % 32;
  const int group = __shfl_sync(kFullWarp, thread / kGroupThreads, 0);  // the compiler sees that warps do not diverge
  const uint32_t ring = shared_address(shared), full = ring + S::kBarriers, empty = full + S::kStages * 8;
  // Every thread arrives for its own accesses: racecheck takes an arrival for the arriving thread's alone.
  if (thread == 0) {
    for (int s = 0; s < S::kStages; ++s) {
      barrier_init(full + s * 8, kGroupThreads);
      barrier_init(empty + s * 8, kGroupThreads);
    }
  }
  __syncthreads();
  if (group == kGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCopyRegisters));
    copy_tiles<kTile>(params, head_tiles, ring, full, empty);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kComputeRegisters));
    float* mean = reinterpret_cast<float*>(shared + S::kMean);
    // Registers are short, so these wait in shared memory; the first warp writes them.
    int4* state = reinterpret_cast<int4*>(mean + (1 + S::kParts) * kTile);
    float* near_mean = reinterpret_cast<float*>(state + 1);
    const uint32_t lane_row = static_cast<uint32_t>(lane) / 8, chunk = static_cast<uint32_t>(lane) % 8;
    const uint32_t row = static_cast<uint32_t>(thread) % kGroupThreads / 32 * (S::kTokens / 4) + lane_row;
    uint32_t mine = row * 128 + (chunk ^ lane_row) * 16;  // place of this thread's first token in a tile
    asm volatile("" : "+r"(mine));
    const uint32_t low_tile = ring + S::kLow + group * S::kStageBytes;
    const bool upper = chunk >= 4;
    wait_for_previous();
    uint32_t base = 0;  // number of the piece's first tile
    for (int32_t at = block_begin(params, head_tiles, blockIdx.x); at >= 0;) {
      const Piece p = piece_at(params, head_tiles, at);
      // Mean: the threads of four channels add every kParts-th sum, so that most loads are in flight at once.
      {
        float* parts = mean + kTile;
        const int part = thread / (kTile / 4), four = thread % (kTile / 4);
        const float4* from =
            reinterpret_cast<const float4*>(sums + static_cast<int64_t>(p.matrix) * sum_chunks * kTile) + four;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int c = part; c < sum_chunks; c += S::kParts) {
          const float4 x = from[c * (kTile / 4)];
          sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
        }
        reinterpret_cast<float4*>(parts)[thread] = sum;
        compute_barrier();
        if (thread < kTile) {
          float total = 0.0f;
#pragma unroll
          for (int q = 0; q < S::kParts; ++q) total += parts[q * kTile + thread];
          mean[thread] = total / static_cast<float>(p.count);
        }
        compute_barrier();
      }
      if (thread < 32) {
        const float distance = near_mean_length<kTile>(mean, lane);
        if (lane == 0) {
          *near_mean = distance;
          *state = make_int4(p.matrix, p.whole, p.next, static_cast<int>(base) + ceil_div(p.end - p.begin, S::kTokens));
        }
      }
      compute_barrier();
      float centre[S::kPanels * 8];
#pragma unroll
      for (int j = 0; j < S::kPanels * 8; ++j) centre[j] = mean[j / 8 * 64 + static_cast<int>(chunk) * 8 + j % 8];

      const bool split = p.count <= kFewTokens;
      const int32_t length = p.end - p.begin;
      const int32_t tiles = ceil_div(length, S::kTokens);
      const int32_t real = length - static_cast<int32_t>(row) - (upper ? 4 : 0);  // see unit_tokens
      uint32_t stage = (base + group) % S::kStages, parity = (base + group) / S::kStages % 2;
      uint32_t busy = 0;  // barrier of the tile in multiplication
      float top[32] = {}, bottom[kTile == 64 ? 1 : 64] = {};
      for (int32_t t = group; t < tiles; t += kGroups) {
        barrier_wait(full + stage * 8, parity);
        const uint32_t high_tile = ring + stage * S::kStageBytes;
        if (split) wgmma_wait<0>();
#pragma unroll
        for (int u = 0; u < S::kOwn; u += 2) {
          // 4 tokens on, the swizzle turns bit 2 of the chunk.
          const auto place = [&](uint32_t tile, int v, int panel) {
            const uint32_t even = mine + tile;
            return (v == 0 ? even : even ^ 64) + panel * S::kPanelBytes + (u + v) * 512;
          };
          float d[2][S::kPanels * 8];
#pragma unroll
          for (int v = 0; v < 2; ++v) {
#pragma unroll
            for (int q = 0; q < S::kPanels; ++q) load_chunk<kBfloat>(place(high_tile, v, q), d[v] + q * 8);
#pragma unroll
            for (int j = 0; j < S::kPanels * 8; ++j) d[v][j] -= centre[j];
          }
          unit_tokens(d, *near_mean, t * S::kTokens + 4 * u < real, upper);
#pragma unroll
          for (int v = 0; v < 2; ++v) {
#pragma unroll
            for (int q = 0; q < S::kPanels; ++q) {
              float* x = d[v] + q * 8;
              store_chunk(place(high_tile, v, q), pack(x));
              if (split) {
                float rest[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) rest[j] = x[j] - __half2float(__float2half_rn(x[j]));
                store_chunk(place(low_tile, v, q), pack(rest));
              }
            }
          }
        }
        wgmma_wait<0>();
        if (busy != 0) barrier_arrive(busy);
        busy = empty + stage * 8;
        wgmma_publish();
        group_barrier(group);
        const uint64_t high = columns_operand(high_tile, S::kPanelBytes);
        const auto multiply = [&](uint64_t left, uint64_t right) {
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < S::kTokens / 16; ++step) {
            const int down = step * (2048 >> 4);
            wgmma_64x64x16(top, left + down, right + down);
            if constexpr (kTile == 128) wgmma_64x128x16(bottom, left + down + (S::kPanelBytes >> 4), right + down);
          }
          wgmma_commit();
        };
        multiply(high, high);
        if (split) {
          const uint64_t low = columns_operand(low_tile, S::kPanelBytes);
          multiply(high, low);
          multiply(low, high);
        }
        stage += kGroups;
        if (stage >= S::kStages) {
          stage -= S::kStages;
          parity ^= 1;
        }
      }
      wgmma_wait<0>();
      if (busy != 0) barrier_arrive(busy);
      wgmma_settle(top);
      wgmma_settle(bottom);

      // Over the groups in order; the last one has the result.
      const int4 done = *state;  // matrix, whole, next piece, its first tile
      const uint32_t of = anew(threadIdx.x) % kGroupThreads;
      float4* group_sums = reinterpret_cast<float4*>(shared + S::kSums) + of;
      float4* slot = partial + (static_cast<int64_t>(blockIdx.x) + done.x) * FragmentPlan<kTile>::kMatrixVectors + of;
      float* out = gram + static_cast<int64_t>(done.x) * kTile * kTile;
      // The first group hands its sums over, the last one adds its own.
      static_assert(kGroups == 2);
      const auto hand_over = [&](int v, const float* c) {
        group_sums[v * kGroupThreads] = make_float4(c[0], c[1], c[2], c[3]);
      };
      const auto finish = [&](int v, const float* c) {
        const float4 y = group_sums[v * kGroupThreads];
        const float4 x = make_float4(y.x + c[0], y.y + c[1], y.z + c[2], y.w + c[3]);
        if (done.y != 0) {
          put_fragment<kTile>(out, v, of, x);
        } else {
          slot[v * kGroupThreads] = x;
        }
      };
      if (group == 0) {
#pragma unroll
        for (int v = 0; v < 8; ++v) hand_over(v, top + 4 * v);
        if constexpr (kTile == 128) {
#pragma unroll
          for (int v = 0; v < 16; ++v) hand_over(8 + v, bottom + 4 * v);
        }
      }
      compute_barrier();
      if (group == 1) {
#pragma unroll
        for (int v = 0; v < 8; ++v) finish(v, top + 4 * v);
        if constexpr (kTile == 128) {
#pragma unroll
          for (int v = 0; v < 16; ++v) finish(8 + v, bottom + 4 * v);
        }
      }
      at = done.z;
      base = static_cast<uint32_t>(done.w);
    }
  }
#endif
}

constexpr int kReduceThreads = 256;

/// Adds the pieces of a head in order, one fragment vector a thread, and writes both triangles.
template <int kTile>
__global__ void __launch_bounds__(kReduceThreads)
    stream_reduce_kernel(const float4* partial, int32_t head_tiles, int32_t blocks, float* gram) {
  const int64_t matrix = blockIdx.y;
  const int vector = blockIdx.x * kReduceThreads + threadIdx.x;
  const int64_t all = int64_t{gridDim.y} * head_tiles;
  const int32_t first = line_owner(all, blocks, matrix * head_tiles);
  const int32_t last = line_owner(all, blocks, (matrix + 1) * head_tiles - 1);
  let_next_start();
  wait_for_previous();
  if (first == last) return;  // written by its block
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int32_t b = first; b <= last; ++b) {
    const float4 x = partial[(b + matrix) * FragmentPlan<kTile>::kMatrixVectors + vector];
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  put_fragment<kTile>(gram + matrix * kTile * kTile, vector / kGroupThreads, vector % kGroupThreads, sum);
}

using Kernel = void (*)(MatrixSpectrumParams, int32_t, int32_t, const float*, float4*, float*);

Kernel kernel_for(const MatrixSpectrumParams& params, int32_t tile) {
  const bool bfloat = params.dtype == DType::bfloat16;
  if (tile == 64) return bfloat ? stream_gram_kernel<64, true> : stream_gram_kernel<64, false>;
  return bfloat ? stream_gram_kernel<128, true> : stream_gram_kernel<128, false>;
}

template <int kTile>
cudaError_t launch(const MatrixSpectrumParams& params, const SpectrumPlan& plan, const float* sums, float4* partial,
                   float* gram, cudaStream_t stream) {
  const Kernel kernel = kernel_for(params, kTile);
  constexpr int kShared = StreamShape<kTile>::kSharedBytes;
  if (const cudaError_t err = allow_shared_memory(reinterpret_cast<const void*>(kernel), kShared); err != cudaSuccess) {
    return err;
  }
  const unsigned blocks = static_cast<unsigned>(plan.stream_blocks);
  const unsigned matrices = static_cast<unsigned>(params.batch) * static_cast<unsigned>(params.heads);
  if (const cudaError_t err = launch_dependent(kernel, true, blocks, kThreads, kShared, stream, params, plan.head_tiles,
                                               plan.sum_chunks, sums, partial, gram);
      err != cudaSuccess || blocks == matrices) {
    return err;  // a block a head: nothing to add
  }
  static_assert(FragmentPlan<kTile>::kMatrixVectors % kReduceThreads == 0);
  return launch_dependent(stream_reduce_kernel<kTile>, true,
                          dim3(FragmentPlan<kTile>::kMatrixVectors / kReduceThreads, matrices), kReduceThreads, 0,
                          stream, static_cast<const float4*>(partial), plan.head_tiles, plan.stream_blocks, gram);
}

}  // namespace

cudaError_t stream_gram_runs(const MatrixSpectrumParams& params, int32_t tile, bool* runs) {
  *runs = false;
  DeviceInfo device{};
  if (const cudaError_t err = device_info(&device); err != cudaSuccess) return err;
  if (device.capability != 90 || params.dtype == DType::float32 || !params.vectors || tile > 128) return cudaSuccess;
  return compiled_for_sm_90(reinterpret_cast<const void*>(kernel_for(params, tile)), runs);
}

cudaError_t stream_gram(const MatrixSpectrumParams& params, const SpectrumPlan& plan, const float* sums,
                        float4* partial, float* gram, cudaStream_t stream) {
  return plan.tile == 64 ? launch<64>(params, plan, sums, partial, gram, stream)
                         : launch<128>(params, plan, sums, partial, gram, stream);
}

}  // namespace uncomp::kernels
