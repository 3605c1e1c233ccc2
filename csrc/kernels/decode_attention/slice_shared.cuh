// SPDX-License-Identifier: Apache-2.0
// Shared memory of attend_slice (slice.cuh), and what goes in and out of it.
#pragma once

#include <cstdint>

#include "core/splits.h"
#include "kernels/common/mma.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/types.cuh"

namespace uncomp::kernels {

inline constexpr int kSliceWarps = 4;
inline constexpr int kSliceThreads = 32 * kSliceWarps;
inline constexpr int kWarpSlots = 16;
inline constexpr int kSliceSlots = kSliceWarps * kWarpSlots;

/// Entries of a warp's ring. `few` lets two blocks share the 163 KiB of sm_80, `many` the 227 KiB of sm_90. At 128
/// channels two more entries would stream no faster, and their first copies take longer.
constexpr int few_entries(int tile) { return tile == 64 ? 6 : tile == 128 ? 4 : 2; }
constexpr int many_entries(int tile) { return tile == 64 ? 10 : tile == 128 ? 4 : 3; }

/// Shared memory of one block. An entry of the ring holds 16 rows whose 16-byte chunks are XOR-swizzled by the row
/// (ring_offset), so that ldmatrix (8 rows, one chunk) meets no bank twice and a copied line of 128 bytes stays one;
/// copies into padded rows, which cross such lines, stream 10 % slower. The padding of `query` and `out` does the
/// former for them.
template <class T, int kTile, int kHeads, int kRing = few_entries(kTile)>
struct alignas(128) SliceShared {
  static constexpr int kWarps = kSliceWarps, kThreads = kSliceThreads, kOutStride = kTile + 4, kQueryStride = kTile + 8;
  static constexpr int kEntry = kWarpSlots * kTile;
  union {
    T ring[kSliceWarps][kRing][kEntry];          // 16 slots of keys, 16 of values in turn
    float out[kSliceWarps][kHeads][kOutStride];  // unnormalised
  };
  T query[kHeads * kQueryStride];
  float top[kSliceWarps][kHeads];  // shift of the exponents, log2 units
  float sum[kSliceWarps][kHeads];
};
static_assert(sizeof(SliceShared<__half, 64, 8>) <= 81 * 1024, "two blocks must fit into 163 KiB");
static_assert(sizeof(SliceShared<__half, 128, 16>) <= 81 * 1024, "two blocks must fit into 163 KiB");
static_assert(sizeof(SliceShared<__half, 256, 16>) <= 81 * 1024, "two blocks must fit into 163 KiB");
static_assert(sizeof(SliceShared<__half, 64, 8, many_entries(64)>) <= 112 * 1024, "two blocks must fit into 227 KiB");
static_assert(sizeof(SliceShared<__half, 128, 16, many_entries(128)>) <= 112 * 1024, "two blocks: 227 KiB");
static_assert(sizeof(SliceShared<__half, 256, 16, many_entries(256)>) <= 112 * 1024, "two blocks: 227 KiB");

/// The group's queries on their way into shared memory; heads and channels beyond the real ones become zero. Reading
/// them before the first copies of attend_slice are issued, and storing them behind, keeps them from queueing there;
/// the largest tile lacks the registers for it.
template <class T, int kTile, int kHeads>
struct QueryInFlight {
  static constexpr int kLanes = kHeads * kTile / kSliceThreads;
  static constexpr bool kEarly = kLanes <= 16;
  const T* query;
  int64_t head_stride;
  int heads, key_dim;
  T data[kEarly ? kLanes : 1];

  __device__ __forceinline__ QueryInFlight(const T* query, int64_t head_stride, int heads, int key_dim)
      : query(query), head_stride(head_stride), heads(heads), key_dim(key_dim) {
    if constexpr (kEarly) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) data[j] = read(j);
    }
  }

  __device__ __forceinline__ T read(int j) const {
    const int i = threadIdx.x + j * kSliceThreads, head = i / kTile, channel = i % kTile;
    return head < heads && channel < key_dim ? query[head * head_stride + channel] : from_float<T>(0.0f);
  }

  template <int kRing>
  __device__ __forceinline__ void store(SliceShared<T, kTile, kHeads, kRing>& shared) const {
    constexpr int kStride = SliceShared<T, kTile, kHeads, kRing>::kQueryStride;
#pragma unroll(kEarly ? kLanes : 4)
    for (int j = 0; j < kLanes; ++j) {
      const int i = threadIdx.x + j * kSliceThreads;
      shared.query[i / kTile * kStride + i % kTile] = kEarly ? data[kEarly ? j : 0] : read(j);
    }
  }
};

template <class T, int kTile, int kHeads, int kRing>
__device__ __forceinline__ void load_query(SliceShared<T, kTile, kHeads, kRing>& shared, const T* query,
                                           int64_t head_stride, int heads, int key_dim) {
  QueryInFlight<T, kTile, kHeads>(query, head_stride, heads, key_dim).store(shared);
}

/// Ignores scores; a caller that wants them passes its own (slot, head, logit in log2 units), called once for each
/// live slot and each of the kHeads columns, real or not.
struct NoScores {
  __device__ __forceinline__ void operator()(int, int, float) const {}
};

/// Nothing to do while the first copies are under way.
struct NoPrepare {
  __device__ __forceinline__ void operator()() const {}
};

/// Softmax state of one head, and one channel of its unnormalised output.
struct HeadState {
  float top, sum, out;
};

/// The warps' states as one, in warp order.
template <class Shared>
__device__ __forceinline__ HeadState merge_warps(const Shared& shared, int head, int channel) {
  HeadState state{-INFINITY, 0.0f, 0.0f};
#pragma unroll
  for (int w = 0; w < Shared::kWarps; ++w) state.top = fmaxf(state.top, shared.top[w][head]);
  const float base = finite_or_zero(state.top);
#pragma unroll
  for (int w = 0; w < Shared::kWarps; ++w) {
    const float weight = exp2f(shared.top[w][head] - base);
    state.sum += weight * shared.sum[w][head];
    state.out += weight * shared.out[w][head][channel];
  }
  return state;
}

/// The same for channels `channel` to `channel` + 3, a multiple of 4.
struct HeadStates4 {
  float top, sum;
  float4 out;
};
template <class Shared>
__device__ __forceinline__ HeadStates4 merge_warps4(const Shared& shared, int head, int channel) {
  HeadStates4 state{-INFINITY, 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
  for (int w = 0; w < Shared::kWarps; ++w) state.top = fmaxf(state.top, shared.top[w][head]);
  const float base = finite_or_zero(state.top);
#pragma unroll
  for (int w = 0; w < Shared::kWarps; ++w) {
    const float weight = exp2f(shared.top[w][head] - base);
    const float4 out = *reinterpret_cast<const float4*>(&shared.out[w][head][channel]);
    state.sum += weight * shared.sum[w][head];
    state.out.x += weight * out.x;
    state.out.y += weight * out.y;
    state.out.z += weight * out.z;
    state.out.w += weight * out.w;
  }
  return state;
}

}  // namespace uncomp::kernels
