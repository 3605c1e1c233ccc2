// SPDX-License-Identifier: Apache-2.0
// A warp turns its run of a row into pooled keys, one chunk after the other: four neighbouring columns a lane, the
// columns beside them by shuffles.
#pragma once

#include "core/select_keys.h"
#include "core/select_plan.h"
#include "kernels/common/mma.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/select_tokens.h"

namespace uncomp::kernels::select_steps {

/// Key of a column that is no candidate. NaN, the smallest candidate, has key 1 here.
inline constexpr uint32_t kNoCandidate = 0, kNanCandidate = 1;
/// Half a pool that the lanes beside a lane can fill; a wider one reads memory.
inline constexpr int32_t kNearHalf = 4;

/// A row of scores counted from the last 16-byte border at or before it: its column 0 is place `skip`. Pooling sees
/// places [skip, to), candidates are [head, to).
struct RowScores {
  const float* border;
  int32_t skip, end;  // places [skip, end) exist
  int32_t head, to;

  __device__ static RowScores of(const SelectTokensParams& p, int32_t row) {
    const float* first = p.scores + row * p.row_stride;
    const int32_t skip = static_cast<int32_t>(reinterpret_cast<uintptr_t>(first) / sizeof(float) % 4);
    return {first - skip, skip, skip + p.columns, 0, 0};
  }
  __device__ __forceinline__ bool has4(int32_t place) const { return place >= skip && place + 3 < end; }
  /// Four places from `place`, a multiple of 4. Places that do not exist are not read.
  __device__ __forceinline__ float4 read4(int32_t place) const {
    if (has4(place)) return __ldg(reinterpret_cast<const float4*>(border + place));
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = place + j >= skip && place + j < end ? __ldg(border + place + j) : 0.0f;
    return {x[0], x[1], x[2], x[3]};
  }
  /// The same into shared memory; it is there after cp_async_wait.
  __device__ __forceinline__ void copy4(float4* to_shared, int32_t place) const {
    if (has4(place)) {
      cp_async16(to_shared, border + place, true);
    } else {
      *to_shared = read4(place);
    }
  }
  /// Whether a chunk and what lies beside it hold nothing but candidates.
  __device__ __forceinline__ bool inner(int32_t chunk) const {
    return chunk >= head + 4 && chunk + kSelectChunk + 4 <= to;
  }
  __device__ __forceinline__ void hide(float4& x, int32_t place, float nothing) const {
    if (place < skip || place >= to) x.x = nothing;
    if (place + 1 < skip || place + 1 >= to) x.y = nothing;
    if (place + 2 < skip || place + 2 >= to) x.z = nothing;
    if (place + 3 < skip || place + 3 >= to) x.w = nothing;
  }
};

/// Largest of a window around each of the places x[4..7], `half` >= 3: all windows have these four.
__device__ __forceinline__ void pool_max_wide(const float (&x)[12], bool four, float (&pool)[4]) {
  const float core = larger_number(larger_number(x[4], x[5]), larger_number(x[6], x[7]));
  const float left2 = larger_number(x[2], x[3]), left3 = larger_number(x[1], left2);
  const float right2 = larger_number(x[8], x[9]), right3 = larger_number(right2, x[10]);
  const float left4 = larger_number(x[0], left3), right4 = larger_number(right3, x[11]);
  pool[0] = larger_number(core, four ? larger_number(left4, x[8]) : left3);
  pool[1] = larger_number(core, larger_number(four ? left3 : left2, four ? right2 : x[8]));
  pool[2] = larger_number(core, larger_number(four ? left2 : x[3], four ? right3 : right2));
  pool[3] = larger_number(core, four ? larger_number(x[3], right4) : right3);
}

/// The same as below in double, for sums of any size: a quotient of two floats that is no tie of the result lies far
/// from one.
__device__ __noinline__ float average_of_any(float sum, float width, float inverse) {
  const double a = sum, b = width, near = inverse, one_over_b = __fma_rn(__fma_rn(-near, b, 1.0), near, near);
  const double estimate = __dmul_rn(a, one_over_b);
  return __double2float_rn(__fma_rn(__fma_rn(-estimate, b, a), one_over_b, estimate));
}

/// Sum / width rounded once, for an odd width from 3 to kMaxPool: what __fdiv_rn gives, without its call.
__device__ __forceinline__ float average(float sum, float width, float inverse) {
  // Two steps give the quotient correctly rounded where the remainder is exact and nothing overflows.
  const float quotient = __fmul_rn(sum, inverse);
  if (fabsf(sum) > 0x1p-90f && fabsf(sum) < 0x1p126f) {
    return __fmaf_rn(__fmaf_rn(-quotient, width, sum), inverse, quotient);
  }
  if (!(fabsf(sum) < __int_as_float(0x7f800000))) return quotient;  // infinite, NaN
  return average_of_any(sum, width, inverse);
}

/// Pools of the four places from `place` on, for any width, from memory.
__device__ inline void pool_far(const RowScores& row, int32_t place, int32_t half, bool max, float nothing,
                                float (&pool)[4]) {
#pragma unroll 1
  for (int32_t at = place - round_up(half, 4); at <= place + 3 + half; at += 4) {
    if (at + 3 < row.skip || at >= row.to) continue;
    float4 four = row.read4(at);
    row.hide(four, at, nothing);
    const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int32_t away = at + k - (place + j);
        if (away < -half || away > half) continue;
        pool[j] = max ? larger_number(pool[j], x[k]) : add_rounded(pool[j], x[k]);
      }
    }
  }
}

/// Keys of this lane's four places of the chunk from `chunk` on. `before`, `mine` and `behind` are the lane's scores of
/// the chunk before, of this and of the one behind; of the outer two only lanes 31 and 0 count. Called by whole warps.
__device__ __forceinline__ uint4 make_keys(const SelectTokensParams& p, const SelectPlan& plan, const RowScores& row,
                                           int32_t chunk, int lane, float4 before, float4 mine, float4 behind) {
  const int32_t half = p.pool / 2, place = chunk + 4 * lane;
  const bool max = p.pool_mode == Pool::max, inner = row.inner(chunk);
  const float nothing = pool_nothing(p.pool_mode);
  float pool[4] = {nothing, nothing, nothing, nothing};
  if (half > kNearHalf) {
    pool_far(row, place, half, max, nothing, pool);
  } else {
    if (!inner) {
      row.hide(before, place - kSelectChunk, nothing);
      row.hide(mine, place, nothing);
      row.hide(behind, place + kSelectChunk, nothing);
    }
    float x[12] = {nothing, nothing, nothing, nothing, mine.x,  mine.y,
                   mine.z,  mine.w,  nothing, nothing, nothing, nothing};
    if (half > 0) {
      const int left = (lane + 31) % 32, right = (lane + 1) % 32;
      const bool first = lane == 0, last = lane == 31;
      x[0] = __shfl_sync(kFullWarp, last ? before.x : mine.x, left);
      x[1] = __shfl_sync(kFullWarp, last ? before.y : mine.y, left);
      x[2] = __shfl_sync(kFullWarp, last ? before.z : mine.z, left);
      x[3] = __shfl_sync(kFullWarp, last ? before.w : mine.w, left);
      x[8] = __shfl_sync(kFullWarp, first ? behind.x : mine.x, right);
      x[9] = __shfl_sync(kFullWarp, first ? behind.y : mine.y, right);
      x[10] = __shfl_sync(kFullWarp, first ? behind.z : mine.z, right);
      x[11] = __shfl_sync(kFullWarp, first ? behind.w : mine.w, right);
    }
    if (max && half >= 3) {
      pool_max_wide(x, half == 4, pool);
    } else if (max) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pool[j] = x[4 + j];
        if (half > 0) pool[j] = larger_number(pool[j], larger_number(x[3 + j], x[5 + j]));
        if (half > 1) pool[j] = larger_number(pool[j], larger_number(x[2 + j], x[6 + j]));
      }
    } else {
#pragma unroll
      for (int d = -kNearHalf; d <= kNearHalf; ++d) {
        if (d < -half || d > half) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) pool[j] = add_rounded(pool[j], x[4 + j + d]);
      }
    }
  }
  if (!max && half > 0) {
#pragma unroll
    for (int j = 0; j < 4; ++j) pool[j] = average(pool[j], plan.pool_width, plan.pool_inverse);
  }
  uint32_t key[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int32_t bits = __float_as_int(__fadd_rn(pool[j], 0.0f));  // -0 becomes 0
    key[j] = pool[j] != pool[j] ? kNanCandidate : static_cast<uint32_t>(bits ^ (bits >> 31 | INT32_MIN));
  }
  if (!inner) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (place + j < row.head || place + j >= row.to) key[j] = kNoCandidate;
    }
  }
  return {key[0], key[1], key[2], key[3]};
}

}  // namespace uncomp::kernels::select_steps
