// SPDX-License-Identifier: Apache-2.0
// A warp copies keys and values of several tokens at once: all loads of a pass are issued before its first store.
// Targets are neighbours and known from the start; slot_tokens.cuh is for slots that the warp learns meanwhile.
#pragma once

#include <cstdint>

#include "core/lanes.h"

namespace uncomp::kernels {

/// Tokens of one tensor, in bytes: from any places of a source to neighbours in a target.
struct TokenRun {
  const char* from;  // source token 0
  int64_t stride;    // between source tokens
  char* to;          // target of this lane's first token
  int32_t bytes;     // of a token
};

/// Source tokens that one lane moves in a pass; the targets of `taken` lie `side_by_side()` tokens apart.
struct TakenTokens {
  static constexpr int32_t kZeros = -1;    // no source: zeros are written
  static constexpr int32_t kNothing = -2;  // no target
  int32_t source[WarpTokens::kInFlight];
};

template <class Lane>
__device__ __forceinline__ Lane load_token(const TokenRun& run, int32_t source, int32_t at) {
  if (source < 0 || at * static_cast<int32_t>(sizeof(Lane)) >= run.bytes) return Lane{};
  return __ldcs(reinterpret_cast<const Lane*>(run.from + source * run.stride) + at);
}

template <class Lane>
__device__ __forceinline__ void store_token(const TokenRun& run, int32_t source, int64_t ahead, int32_t at, Lane data) {
  if (source == TakenTokens::kNothing || at * static_cast<int32_t>(sizeof(Lane)) >= run.bytes) return;
  reinterpret_cast<Lane*>(run.to + ahead * run.bytes)[at] = data;
}

/// Copies the tokens' keys and values in accesses of type Lane; reads are not expected to be repeated.
template <class Lane>
__device__ __forceinline__ void move_kv(const TokenRun& keys, const TokenRun& values, const TakenTokens& taken,
                                        WarpTokens tokens, int lane) {
  constexpr int kFlights = WarpTokens::kInFlight;
  const int32_t pieces = max_of(keys.bytes, values.bytes) / static_cast<int32_t>(sizeof(Lane));
  for (int32_t at = tokens.place(lane); at < pieces; at += tokens.lanes()) {
    Lane key[kFlights], value[kFlights];
#pragma unroll
    for (int u = 0; u < kFlights; ++u) {
      key[u] = load_token<Lane>(keys, taken.source[u], at);
      value[u] = load_token<Lane>(values, taken.source[u], at);
    }
#pragma unroll
    for (int u = 0; u < kFlights; ++u) {
      const int64_t ahead = u * tokens.side_by_side();
      store_token(keys, taken.source[u], ahead, at, key[u]);
      store_token(values, taken.source[u], ahead, at, value[u]);
    }
  }
}

/// Calls `f(Lane{})` with the access type of `lane_bytes`.
template <class F>
void dispatch_lane(int32_t lane_bytes, F&& f) {
  switch (lane_bytes) {
    case 16:
      return f(uint4{});
    case 8:
      return f(uint2{});
    case 4:
      return f(static_cast<unsigned int>(0));
    default:
      return f(static_cast<unsigned short>(0));
  }
}

}  // namespace uncomp::kernels
