// SPDX-License-Identifier: Apache-2.0
// Keys and values on their way before it is known where they go: a warp loads its tokens, learns their slots, stores.
// Every token has an address and a slot of its own, ready beforehand: the runs of move_tokens.cuh in their place cost
// append_kv_ 0.5 us.
#pragma once

#include <cstdint>

#include "core/lanes.h"

namespace uncomp::kernels {

/// Source tokens that one lane moves in a pass, and the slots they move to.
struct SlotTokens {
  static constexpr int32_t kNothing = -2;  // no target
  int32_t source[WarpTokens::kInFlight];
  int32_t slot[WarpTokens::kInFlight];
};

/// Tokens of one tensor, in bytes: from a place of its own each to slots of a target.
struct SlotRun {
  const char* from[WarpTokens::kInFlight];  // token of each flight
  char* to;                                 // slot 0
  int32_t bytes;                            // of a token
};

/// Keys and values that a lane has on their way.
template <class Lane>
struct MovingTokens {
  static constexpr int kFlights = WarpTokens::kInFlight;
  Lane key[kFlights], value[kFlights];

  __device__ __forceinline__ static Lane load(const SlotRun& run, int u, int32_t source, int32_t at) {
    if (source < 0 || at * static_cast<int32_t>(sizeof(Lane)) >= run.bytes) return Lane{};
    return __ldcs(reinterpret_cast<const Lane*>(run.from[u]) + at);
  }
  __device__ __forceinline__ static void store(const SlotRun& run, int32_t source, int32_t slot, int32_t at,
                                               Lane data) {
    if (source == SlotTokens::kNothing || at * static_cast<int32_t>(sizeof(Lane)) >= run.bytes) return;
    reinterpret_cast<Lane*>(run.to + static_cast<int64_t>(slot) * run.bytes)[at] = data;
  }
  /// Reads are not expected to be repeated.
  __device__ __forceinline__ void load(const SlotRun& keys, const SlotRun& values, const SlotTokens& taken,
                                       int32_t at) {
#pragma unroll
    for (int u = 0; u < kFlights; ++u) {
      key[u] = load(keys, u, taken.source[u], at);
      value[u] = load(values, u, taken.source[u], at);
    }
  }
  __device__ __forceinline__ void store(const SlotRun& keys, const SlotRun& values, const SlotTokens& taken,
                                        int32_t at) const {
#pragma unroll
    for (int u = 0; u < kFlights; ++u) {
      store(keys, taken.source[u], taken.slot[u], at, key[u]);
      store(values, taken.source[u], taken.slot[u], at, value[u]);
    }
  }
};

}  // namespace uncomp::kernels
