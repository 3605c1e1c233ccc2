// SPDX-License-Identifier: Apache-2.0
// Attention over fp32 latents on plain multiply-adds: a warp makes the key of one slot at a time from the basis in
// global memory. A twin without rounding, not a fast path.
#pragma once

#include "kernels/decode_attention/latent_block.cuh"
#include "kernels/decode_attention/slice_fp32.cuh"

namespace uncomp::kernels {

/// What launches read of the one compiled shape.
using LatentShapeFp32 = LatentShape<256, 256, 16, kWarpSlots, 1, kSliceWarps, 1>;

/// Key of a latent, by all lanes of a warp, into key [D].
__device__ __forceinline__ void make_key_fp32(const KeyTransformParams& transform, int head, int rank,
                                              const float* latent, int64_t position, float* key) {
  const int lane = threadIdx.x % 32, dim = transform.dim, pairs = transform.pairs;
  const float* const basis = static_cast<const float*>(transform.basis) + static_cast<int64_t>(head) * rank * dim;
  __syncwarp();
  float squares = 0.0f;
  for (int channel = lane; channel < dim; channel += 32) {
    float sum = transform.bias == nullptr ? 0.0f : transform.bias[static_cast<int64_t>(head) * dim + channel];
    for (int k = 0; k < rank; ++k) sum += latent[k] * basis[k * dim + channel];
    squares += sum * sum;
    key[channel] = transform.norm == nullptr ? sum : sum * transform.norm[channel];
  }
  if (transform.norm != nullptr) {
    const float factor = rsqrtf(warp_sum(squares) / static_cast<float>(dim) + transform.norm_eps);
    for (int channel = lane; channel < dim; channel += 32) key[channel] *= factor;
  }
  __syncwarp();
  for (int i = lane; i < pairs; i += 32) {
    const double turns = static_cast<double>(position) * transform.frequency[i] * 0.15915494309189534;
    float cos, sin;
    sincospif(static_cast<float>(2.0 * (turns - rint(turns))), &sin, &cos);
    const float x = key[i], y = key[i + pairs];
    key[i] = (x * cos - y * sin) * transform.rotary_scale;
    key[i + pairs] = (y * cos + x * sin) * transform.rotary_scale;
  }
  __syncwarp();
}

template <class Shape>
struct LatentBlock<float, Shape> {
  using Shared = SliceShared<float, 256, 16>;
  static constexpr int kWarps = kSliceWarps, kThreads = kSliceThreads, kBlocks = 1;

  Shared& shared;
  const KeyTransformParams& transform;
  float (*keys)[256];  // one a warp
  int rank;

  __device__ __forceinline__ LatentBlock(void* memory, const KeyTransformParams& transform, int rank)
      : shared(*static_cast<Shared*>(memory)),
        transform(transform),
        keys(reinterpret_cast<float (*)[256]>(&shared + 1)),
        rank(rank) {}

  static size_t bytes(int, int) { return sizeof(Shared) + kSliceWarps * 256 * sizeof(float); }

  template <class OnScore = NoScores>
  __device__ __forceinline__ void attend(const LatentQuery<float>& q, const float* key_rows, const float* value_rows,
                                         int64_t slot, int count, int value_dim, float scale_log2,
                                         OnScore on_score = {}) {
    load_query(shared, q.query, q.head_stride, q.heads, transform.dim);
    __syncthreads();
    const int32_t offset = position_offset(transform, q.sequence);
    const auto make = [&](int at, float* key) {
      const int64_t position = transform.pairs == 0 ? 0 : int64_t{transform.slot_position[slot + at]} + offset;
      make_key_fp32(transform, q.kv_head, rank, key_rows + (slot + at) * rank, position, key);
    };
    attend_slice(shared, key_rows, value_rows + slot * value_dim, count, transform.dim, value_dim, scale_log2, on_score,
                 NoPrepare{}, make, keys[threadIdx.x / 32]);
  }

  template <class OnScore>
  __device__ __forceinline__ void attend_new(const LatentQuery<float>& q, const float* latent, int32_t position,
                                             float scale_log2, OnScore on_score) {
    load_query(shared, q.query, q.head_stride, q.heads, transform.dim);
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* const key = keys[warp];
    make_key_fp32(transform, q.kv_head, rank, latent, int64_t{position} + position_offset(transform, q.sequence), key);
    for (int h = warp; h < q.heads; h += kSliceWarps) {
      float dot = 0.0f;
      for (int channel = lane; channel < transform.dim; channel += 32) {
        dot += key[channel] * shared.query[h * Shared::kQueryStride + channel];
      }
      dot = warp_sum(dot);
      if (lane == 0) on_score(h, dot * scale_log2);
    }
  }
};

}  // namespace uncomp::kernels
