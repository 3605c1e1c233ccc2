// SPDX-License-Identifier: Apache-2.0
// Shared memory of attention over latents (latent_slice.cuh): rings of latents and values, and what makes a key.
//
// The channels of a key lie in an order of their own in which a turning pair is 8 places apart: place 16 p + j holds
// one of pair 8 p + j, place 16 p + 8 + j the other. A lane then has both in its accumulators, whatever part of a key
// turns.
#pragma once

#include "kernels/decode_attention/key_transform.h"
#include "kernels/decode_attention/slice.cuh"

namespace uncomp::kernels {

/// Sizes of one compiled kernel. kSlots are those that a warp takes at a time, 16 or 32; kStages such groups are on the
/// way; kBlocks fit on a multiprocessor. kSpan positions that follow one another turn by a table (latent_turn.cuh).
template <int kRank_, int kValue_, int kHeads_, int kSlots_, int kStages_, int kWarps_, int kBlocks_, int kSpan_ = 0>
struct LatentShape {
  static constexpr int kSpan = kSpan_;
  static constexpr int kRank = kRank_, kValue = kValue_, kHeads = kHeads_, kSlots = kSlots_, kStages = kStages_;
  static constexpr int kWarps = kWarps_, kBlocks = kBlocks_, kThreads = 32 * kWarps;
};

/// The part whose size is known when compiled. Behind it lie basis, query, bias, norm and turns: LatentTables.
template <class T, class Shape>
struct alignas(128) LatentShared {
  static constexpr int kWarps = Shape::kWarps, kThreads = Shape::kThreads, kOutStride = Shape::kValue + 4;
  static constexpr int kLatents = Shape::kSlots * Shape::kRank, kValues = Shape::kSlots * Shape::kValue;
  union {
    T ring[kWarps][Shape::kStages][kLatents + kValues];
    float out[kWarps][Shape::kHeads][kOutStride];  // unnormalised
  };
  float top[kWarps][Shape::kHeads];  // shift of the exponents, log2 units
  float sum[kWarps][Shape::kHeads];
};

/// What makes a key of a latent, channels by place.
template <class T>
struct LatentTables {
  T* basis;        // [kRank, stride]
  T* query;        // [kHeads, stride]
  float* bias;     // [2 D]: places 2 i and 2 i + 1 twice, as the sums of a lane want them
  float* weight;   // [D] where weighs_channels
  float* key;      // [D] of a new token
  uint32_t* turn;  // [D / 2]: parts of 2^32 of a full turn a token; 0 where nothing turns
  uint4* turns;    // [D / 16, kSpan / 16, 32]: fill_turns
  T* turned;       // [kWarps, heads, stride]: queries turned back
  int stride;      // D + 8: ldmatrix meets no bank twice

  template <class Shape>
  __device__ __forceinline__ static LatentTables in(LatentShared<T, Shape>* shared, int dim) {
    LatentTables t;
    t.stride = dim + 8;
    t.basis = reinterpret_cast<T*>(shared + 1);
    t.query = t.basis + Shape::kRank * t.stride;
    t.bias = reinterpret_cast<float*>(t.query + Shape::kHeads * t.stride);
    t.weight = t.bias + 2 * dim;
    t.key = t.weight + dim;
    t.turn = reinterpret_cast<uint32_t*>(t.key + dim);
    t.turns = reinterpret_cast<uint4*>(t.turn + dim / 2);
    t.turned = reinterpret_cast<T*>(t.turns + dim / 16 * (Shape::kSpan / 16) * 32);
    return t;
  }
};

template <class T, class Shape>
size_t latent_shared_bytes(int dim, int heads) {
  const int turned = Shape::kSpan > 0 ? Shape::kWarps * heads : 0;
  return sizeof(LatentShared<T, Shape>) + (Shape::kRank + Shape::kHeads + turned) * (dim + 8) * sizeof(T) +
         dim * (4 * sizeof(float) + sizeof(uint32_t) / 2) + dim / 16 * (Shape::kSpan / 16) * 32 * sizeof(uint4);
}

/// Channel at a place.
__device__ __forceinline__ int channel_at(int place, int dim, int pairs) {
  const int i = place / 16 * 8 + place % 8;
  const bool second = place % 16 >= 8;
  return i < pairs ? i + (second ? pairs : 0) : pairs + i + (second ? dim / 2 - pairs : 0);
}

/// A frequency as parts of 2^32 of a full turn: times a position it wraps round exactly.
__device__ __forceinline__ uint32_t turn32(float frequency) {
  return static_cast<uint32_t>(__double2ll_rn(static_cast<double>(frequency) * 683565275.5764316));
}

/// Whether channels of a key have factors of their own. Where all turn and none has a norm, rotary_scale is a factor of
/// the logits.
__device__ __forceinline__ bool weighs_channels(const KeyTransformParams& transform) {
  return transform.norm != nullptr || (transform.rotary_scale != 1.0f && 2 * transform.pairs < transform.dim);
}
__device__ __forceinline__ float logit_factor(const KeyTransformParams& transform) {
  return weighs_channels(transform) || transform.pairs == 0 ? 1.0f : transform.rotary_scale;
}

/// threadIdx.x of which nothing is known: what is computed of it stays inside the loop over a block's pieces of rows,
/// where registers are free, instead of being kept throughout.
__device__ __forceinline__ int opaque_thread() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

/// Basis of KV head `head`, by asynchronous copies where channels lie in eights; the caller waits for them and for the
/// other threads.
template <class Shape, class T>
__device__ __forceinline__ void load_basis(const LatentTables<T>& tables, const KeyTransformParams& transform, int head,
                                           int rank) {
  const int thread = opaque_thread(), dim = transform.dim, pairs = transform.pairs,
            lanes = dim > 128 ? 32 : 16;  // of a row
  const T* const basis = static_cast<const T*>(transform.basis) + static_cast<int64_t>(head) * rank * dim;
  const int place = thread % lanes * 8;
  if (place >= dim) return;
  if (pairs % 8 == 0) {
    const T* const from = basis + channel_at(place, dim, pairs);
    for (int k = thread / lanes; k < Shape::kRank; k += Shape::kThreads / lanes) {
      cp_async16(tables.basis + k * tables.stride + place, k < rank ? from + k * dim : basis, k < rank);
    }
    return;
  }
  for (int k = thread / lanes; k < Shape::kRank; k += Shape::kThreads / lanes) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      tables.basis[k * tables.stride + place + i] =
          k < rank ? basis[k * dim + channel_at(place + i, dim, pairs)] : from_float<T>(0.0f);
    }
  }
}

/// The group's queries, bias, weights and turns on their way into shared memory. Reading them before the first copies
/// of attend_latents are issued, and storing them behind, keeps them from queueing there. Heads beyond the real ones
/// become zero.
template <class T, class Shape>
struct LatentInFlight {
  static constexpr int kHeadsOfWarp = Shape::kHeads >= Shape::kWarps ? Shape::kHeads / Shape::kWarps : 1;
  static constexpr int kPlaces = 256 / 32, kMine = (256 + Shape::kThreads - 1) / Shape::kThreads;
  T query[kHeadsOfWarp][kPlaces];
  float bias[kMine], weight[kMine], frequency[kMine];

  __device__ __forceinline__ LatentInFlight(const KeyTransformParams& transform, int kv_head, const T* from,
                                            int64_t head_stride, int heads) {
    const int dim = transform.dim, pairs = transform.pairs, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < kHeadsOfWarp; ++h) {
      const int head = warp + h * Shape::kWarps;
#pragma unroll
      for (int c = 0; c < kPlaces; ++c) {
        const int place = lane + 32 * c;
        query[h][c] = head < heads && place < dim ? from[head * head_stride + channel_at(place, dim, pairs)]
                                                  : from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int place = threadIdx.x + i * Shape::kThreads, channel = channel_at(place, dim, pairs);
      const bool live = place < dim;
      bias[i] =
          live && transform.bias != nullptr ? transform.bias[static_cast<int64_t>(kv_head) * dim + channel] : 0.0f;
      weight[i] = live && transform.norm != nullptr ? transform.norm[channel] : 1.0f;
      if (channel < 2 * pairs) weight[i] *= transform.rotary_scale;
      frequency[i] = place < pairs ? transform.frequency[place] : 0.0f;
    }
  }

  __device__ __forceinline__ void store(const LatentTables<T>& tables, int dim) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < kHeadsOfWarp; ++h) {
      const int head = warp + h * Shape::kWarps;
#pragma unroll
      for (int c = 0; c < kPlaces; ++c) {
        const int place = lane + 32 * c;
        if (head < Shape::kHeads && place < dim) tables.query[head * tables.stride + place] = query[h][c];
      }
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int place = threadIdx.x + i * Shape::kThreads;
      if (place >= dim) break;
      tables.bias[place / 2 * 4 + place % 2] = tables.bias[place / 2 * 4 + 2 + place % 2] = bias[i];
      tables.weight[place] = weight[i];
      if (place < dim / 2) tables.turn[place] = turn32(frequency[i]);
    }
  }
};

}  // namespace uncomp::kernels
