// SPDX-License-Identifier: Apache-2.0
// Which tokens are undecided, and the last that stays among a list of them.
#pragma once

#include "core/select_plan.h"
#include "kernels/select_tokens/digits.cuh"

namespace uncomp::kernels::select_steps {

/// A token's key above its place: the larger one stays, of equal keys the one that comes first.
struct Ranked {
  int32_t spread;  // zero bits in front of the largest place, so that the upper bits of places differ

  __device__ static Ranked of(int32_t places) { return {__clz(places)}; }
  __device__ __forceinline__ uint64_t rank(uint32_t key, int32_t place) const {
    return static_cast<uint64_t>(key) << 32 | ~(static_cast<uint32_t>(place) << spread);
  }
  __device__ __forceinline__ int32_t place(uint64_t rank) const {
    return static_cast<int32_t>(~static_cast<uint32_t>(rank) >> spread);
  }
};

/// Ranks whose bits from `shift` on are `prefix` are undecided: `need` of these `inside` stay.
struct Undecided {
  int32_t shift, above;  // lowest bit of the digit in work, of the one before
  uint64_t prefix;
  uint32_t need, inside;

  __device__ __forceinline__ bool has(uint64_t rank) const { return above >= 64 || rank >> above == prefix; }
  /// The bits of `rank` in work.
  __device__ __forceinline__ uint32_t digit(uint64_t rank) const {
    return static_cast<uint32_t>(rank >> shift) & ((1u << (above - shift)) - 1);
  }
  __device__ void begin_digit(int32_t bits) {
    above = shift;
    shift = max_of(above - bits, 0);
  }
  __device__ void end_digit(const Digit& digit) {
    prefix = (above >= 64 ? 0 : prefix << (above - shift)) | digit.value;
    above = shift;
    need -= digit.above;
    inside = digit.inside;
  }
};

inline constexpr uint32_t kFew = 64;  // ranks that are compared with one another

struct ChooseScratch {
  uint64_t few[kFew];
  uint64_t last;   // the lowest rank that stays
  uint32_t count;  // of few; zero before
  Digit digit;
};

/// The lowest rank that stays, among `all`: the undecided ranks, which the caller has made visible to the block.
/// `histogram` is clear.
template <int kBits>
__device__ __forceinline__ uint64_t choose_last(const uint64_t* all, Undecided u, const Histogram<kBits>& histogram,
                                                ChooseScratch& scratch) {
  const uint32_t thread = threadIdx.x, threads = blockDim.x, total = u.inside;
#pragma unroll 1
  for (bool clear = true; u.inside > kFew; clear = false) {
    if (!clear) {
      histogram.clear();
      __syncthreads();
    }
    u.begin_digit(kBits);
#pragma unroll 1
    for (uint32_t i = thread; i < total; i += threads) {
      if (u.has(all[i])) atomicAdd(&histogram.bin()[u.digit(all[i])], 1u);
    }
    histogram.find(Team{0, 1}, u.need, scratch.digit, [] {});
    u.end_digit(scratch.digit);
  }
#pragma unroll 1
  for (uint32_t i = thread; i < total; i += threads) {
    if (u.has(all[i])) scratch.few[atomicAdd(&scratch.count, 1u)] = all[i];
  }
  __syncthreads();
  if (thread < u.inside) {
    const uint64_t mine = scratch.few[thread];
    uint32_t larger = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < u.inside; ++i) larger += scratch.few[i] > mine;
    if (larger == u.need - 1) scratch.last = mine;
  }
  __syncthreads();
  return scratch.last;
}

}  // namespace uncomp::kernels::select_steps
