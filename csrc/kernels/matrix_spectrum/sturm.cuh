// SPDX-License-Identifier: Apache-2.0
// Multisection by a whole block: one round with the probes of all threads over the whole range, then rounds in which
// the threads share the wanted eigenvalues. A thread walks the rows with two probes at once, so that one's arithmetic
// fills the other's waits.
#pragma once

#include "core/sturm.h"
#include "kernels/common/reduce.cuh"

namespace uncomp::kernels {

/// Intervals are cut to this width, or to this share of the largest eigenvalue's bound where that is larger. The
/// eigenvalues add up to 1.
inline constexpr float kSturmWidth = 6e-8f;

inline constexpr int kThreadProbes = 2;

/// Rows are taken in this many at a time; a matrix is padded to whole chunks with kSturmPadding.
inline constexpr int kSturmChunk = 16;

__host__ __device__ constexpr int sturm_rows(int n) { return round_up(n, kSturmChunk); }

/// above[q]: eigenvalues of the `padded` rows that are not below x[q].
__device__ __forceinline__ void count_above(const TridiagonalRow<float>* rows, int padded,
                                            const float (&x)[kThreadProbes], int (&above)[kThreadProbes]) {
  static_assert(SturmMinors::kStride == 4);
  SturmMinors minors[kThreadProbes];
#pragma unroll
  for (int q = 0; q < kThreadProbes; ++q) above[q] = padded;
  float4 pair[kSturmChunk / 2];
  const auto fetch = [&](int base) {
#pragma unroll
    for (int i = 0; i < kSturmChunk / 2; ++i) pair[i] = *reinterpret_cast<const float4*>(rows + base + 2 * i);
  };
  fetch(0);
  for (int base = 0; base < padded; base += kSturmChunk) {
    float4 now[kSturmChunk / 2];
#pragma unroll
    for (int i = 0; i < kSturmChunk / 2; ++i) now[i] = pair[i];
    fetch(base + kSturmChunk < padded ? base + kSturmChunk : base);
#pragma unroll
    for (int i = 0; i < kSturmChunk / 2; i += 2) {
      // Scales are found from the minors before two rows and used behind them, so that no row waits for one.
      float scale[kThreadProbes];
#pragma unroll
      for (int q = 0; q < kThreadProbes; ++q) scale[q] = minors[q].scale();
#pragma unroll
      for (int q = 0; q < kThreadProbes; ++q) minors[q].step({now[i].x, now[i].y}, x[q]);
#pragma unroll
      for (int q = 0; q < kThreadProbes; ++q) minors[q].step({now[i].z, now[i].w}, x[q]);
#pragma unroll
      for (int q = 0; q < kThreadProbes; ++q) minors[q].rescale(scale[q]);
#pragma unroll
      for (int q = 0; q < kThreadProbes; ++q) minors[q].step({now[i + 1].x, now[i + 1].y}, x[q]);
#pragma unroll
      for (int q = 0; q < kThreadProbes; ++q) minors[q].step({now[i + 1].z, now[i + 1].w}, x[q]);
    }
#pragma unroll
    for (int q = 0; q < kThreadProbes; ++q) above[q] -= minors[q].negative_pivots(kSturmChunk);
  }
}

/// An interval that is cut by equally spaced probes. Intervals nest, and those of different eigenvalues meet in the
/// same float at most, so that the values descend whatever the rounding.
struct Section {
  float low, high;

  /// `share`: 1 / (number of probes + 1).
  __device__ float probe(int i, float share) const {
    return fminf(__fmaf_rn((high - low) * share, static_cast<float>(i + 1), low), high);
  }
  /// `reached`: how many probes are not above the eigenvalue.
  __device__ void narrow(int reached, int probes, float share) {
    const float above = reached == probes ? high : probe(reached, share);
    low = reached == 0 ? low : probe(reached - 1, share);
    high = above;
  }
  /// An interval that never left 0 holds nothing but rounding.
  __device__ float value() const { return low > 0.0f ? fminf(low + 0.5f * (high - low), high) : 0.0f; }
};

/// Writes eigenvalues first .. first + count - 1 of the descending order, at least 0, to their places in out [top], as
/// far as they lie there. `rows` [sturm_rows(n)] and `reached` [kThreadProbes * kThreads] lie in shared memory; count
/// <= kThreads, and the same in all blocks that share a matrix, so that they probe alike. Call by all threads, behind
/// the barrier that completes `rows`.
template <int kThreads>
__device__ void write_eigenvalues(const TridiagonalRow<float>* rows, int n, int first, int count, int top, float* out,
                                  int* reached) {
  constexpr int kProbes = kThreads * kThreadProbes;
  const int thread = threadIdx.x, lane = thread % 32, padded = sturm_rows(n), padding = padded - n;
  float reach = 0.0f;
  for (int i = lane; i < n; i += 32) reach = fmaxf(reach, gershgorin_reach(rows, n, i));
  Section section{0.0f, nonnegative_bracket(warp_max(reach)).high};
  float share = 1.0f / (kProbes + 1), width = section.high * share;
  const float narrow_enough = kSturmWidth * fmaxf(section.high, 1.0f);
  float x[kThreadProbes];
  int above[kThreadProbes];
#pragma unroll
  for (int q = 0; q < kThreadProbes; ++q) x[q] = section.probe(thread + q * kThreads, share);
  count_above(rows, padded, x, above);
#pragma unroll
  for (int q = 0; q < kThreadProbes; ++q) reached[thread + q * kThreads] = above[q] - padding;
  __syncthreads();

  int group = 32;  // threads an eigenvalue
  while (group > 1 && group * count > kThreads) group /= 2;
  const int wanted = thread / group, index = first + wanted;
  if (thread / 32 * 32 / group >= count) return;  // the whole warp

  // reached[] falls with the probe: the number of probes that at least index + 1 eigenvalues reach.
  int low = 0, high = kProbes;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (reached[middle] > index) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  section.narrow(low, kProbes, share);

  const int probes = group * kThreadProbes;
  const unsigned group_mask = group == 32 ? kFullWarp : (1u << group) - 1;
  share = 1.0f / static_cast<float>(probes + 1);
  // The width without rounding, so that all warps take the same number of rounds and none takes one for ever.
  for (; width > narrow_enough && width < INFINITY; width *= share) {
#pragma unroll
    for (int q = 0; q < kThreadProbes; ++q) x[q] = section.probe(lane % group + q * group, share);
    count_above(rows, padded, x, above);
    int reaching = 0;
#pragma unroll
    for (int q = 0; q < kThreadProbes; ++q) {
      const unsigned votes = __ballot_sync(kFullWarp, above[q] - padding > index);
      reaching += __popc(votes >> (lane / group * group) & group_mask);
    }
    section.narrow(reaching, probes, share);
  }
  if (wanted < count && index < top && lane % group == 0) out[index] = section.value();
}

}  // namespace uncomp::kernels
