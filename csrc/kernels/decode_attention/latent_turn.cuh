// SPDX-License-Identifier: Apache-2.0
// Rotary positions of keys made of latents. Slots whose positions follow one another, as all do before anything is
// evicted, need no sines: key and query meet at first + d as the key turned by d and the query turned back by `first`
// do, and the turns by d are the same for every such group of slots.
#pragma once

#include <type_traits>

#include "kernels/common/types.cuh"

namespace uncomp::kernels {

/// cos and sin of an angle in parts of 2^32 of a full turn. The upper bits become a float without a conversion, which
/// would queue where the sines do.
__device__ __forceinline__ float2 cos_sin(uint32_t position, uint32_t turn) {
  const float turns = __uint_as_float(((position * turn) >> 9) + 0x3f800000u);  // 1 to 2
  const float angle = fmaf(turns, 6.2831853071795865f, -6.2831853071795865f);
  return {__cosf(angle), __sinf(angle)};
}

/// Two neighbouring pairs (x, y) turned by angles of cosines `c` and sines `s`, all packed; rounded as models do that
/// turn keys in their own type.
template <class T>
__device__ __forceinline__ void turn2(uint32_t& x, uint32_t& y, uint32_t c, uint32_t s) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const auto of = [](const uint32_t& v) { return reinterpret_cast<const Pair&>(v); };
  const Pair turned_x = __hfma2(of(x), of(c), __hneg2(__hmul2(of(y), of(s))));
  const Pair turned_y = __hfma2(of(y), of(c), __hmul2(of(x), of(s)));
  x = reinterpret_cast<const uint32_t&>(turned_x);
  y = reinterpret_cast<const uint32_t&>(turned_y);
}

/// What a lane needs to turn channels of one place group at two slots 8 apart: cosines of two pairs and their sines at
/// the first, at the second. `turn` are those of the two pairs.
template <class T>
__device__ __forceinline__ uint4 turns_at(uint32_t slot, uint32_t behind, uint2 turn) {
  const float2 a = cos_sin(slot, turn.x), b = cos_sin(slot, turn.y);
  const float2 c = cos_sin(behind, turn.x), d = cos_sin(behind, turn.y);
  return {pack2<T>(a.x, b.x), pack2<T>(a.y, b.y), pack2<T>(c.x, d.x), pack2<T>(c.y, d.y)};
}

/// Turns by 0 to 16 kTiles - 1 positions, [D / 16, kTiles, 32] as lanes take them: by all kThreads of a block, barriers
/// are the caller's. `turn` [D / 2] in parts of 2^32 of a full turn.
template <class T, int kTiles, int kThreads>
__device__ __forceinline__ void fill_turns(uint4* by, const uint32_t* turn, int dim) {
  for (int i = threadIdx.x; i < dim / 16 * kTiles * 32; i += kThreads) {
    const int slot = i / 32 % kTiles * 16 + i % 32 / 4;
    by[i] = turns_at<T>(slot, slot + 8, *reinterpret_cast<const uint2*>(turn + i / 32 / kTiles * 8 + i % 4 * 2));
  }
}

/// The queries of `heads` heads turned back by `first` positions, from `from` to `to` [heads, stride], channels by
/// place (latent_shared.cuh): by one warp for itself.
template <class T, int kHeads>
__device__ __forceinline__ void turn_back(T* to, const T* from, int stride, const uint32_t* turn, int dim, int heads,
                                          uint32_t first) {
  __syncwarp();  // products of the latest group have read it
  for (int couple = threadIdx.x % 32; couple < dim / 4; couple += 32) {
    const uint4 by = turns_at<T>(0u - first, 0u, *reinterpret_cast<const uint2*>(turn + 2 * couple));
    const int place = couple / 4 * 16 + couple % 4 * 2;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= heads) break;
      uint32_t x = *reinterpret_cast<const uint32_t*>(from + h * stride + place);
      uint32_t y = *reinterpret_cast<const uint32_t*>(from + h * stride + place + 8);
      turn2<T>(x, y, by.x, by.y);
      *reinterpret_cast<uint32_t*>(to + h * stride + place) = x;
      *reinterpret_cast<uint32_t*>(to + h * stride + place + 8) = y;
    }
  }
  __syncwarp();
}

/// No position is near: what the queries of a warp are turned back by before the first time.
inline constexpr uint32_t kNowhere = 1u << 31;

/// Whether queries turned back by `turned` serve kSlots positions from `first` on, with turns by less than kSpan.
template <int kSpan, int kSlots>
__device__ __forceinline__ bool serves(uint32_t turned, uint32_t first) {
  return (first - turned) % 16 == 0 && first - turned <= kSpan - kSlots;
}

}  // namespace uncomp::kernels
