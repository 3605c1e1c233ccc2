// SPDX-License-Identifier: Apache-2.0
// Eigenvalues of a symmetric tridiagonal matrix by counting: the number of negative pivots of T - x I is the number of
// eigenvalues below x. Each count is independent of all others, so many probes run at once.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/math.h"

namespace uncomp {

/// Row i of a tridiagonal matrix whose entries are at most about 1 in size.
template <class T>
struct TridiagonalRow {
  T diagonal;
  T coupling_square;  // square of the entry that joins i - 1 and i; row 0: any
};

/// Couplings are kept above this, so that a pivot of exactly 0 gives an infinite one and never 0 * infinity. It moves
/// no eigenvalue by more than its square root.
template <class T>
inline constexpr T kCouplingFloor = sizeof(T) == 4 ? T(1e-20) : T(1e-40);

template <class T>
UNCOMP_HD inline TridiagonalRow<T> tridiagonal_row(T diagonal, T coupling) {
  return {diagonal, max_of(coupling * coupling, kCouplingFloor<T>)};
}

/// 1 / x; on the device in one instruction. x = +-0 gives +-infinity and the other way round.
template <class T>
UNCOMP_HD inline T pivot_reciprocal(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
  }
#endif
  return T(1) / x;
}

/// Number of eigenvalues below x. A pivot of -0 counts as negative, +0 as positive; the pivot behind it restores the
/// count either way.
template <class T>
UNCOMP_HD inline int sturm_count(const TridiagonalRow<T>* rows, int n, T x) {
  T pivot = rows[0].diagonal - x;
  int below = std::signbit(pivot) ? 1 : 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 8
#endif
  for (int i = 1; i < n; ++i) {
    pivot = (rows[i].diagonal - x) - rows[i].coupling_square * pivot_reciprocal(pivot);
    below += std::signbit(pivot) ? 1 : 0;
  }
  return below;
}

/// The same count without divisions, for processors on which they are slow: the leading minors of T - x I follow a
/// recurrence of two products, and a pivot is negative where neighbouring minors differ in sign. Minors are scaled by
/// powers of two once in kStride rows: in so few rows they neither overflow nor, with couplings above their floor, do
/// both of the last two vanish. Their relative errors are errors of as many units in the last place of T's entries.
struct SturmMinors {
  static constexpr int kStride = 4;
  static constexpr uint32_t kExponent = 0x7f800000u, kLargest = 254u << 23;
  static constexpr uint32_t kTarget = (100u + 127u + 127u) << 23;  // exponent fields that multiply to 2^100

  float last = 1.2676506e30f, before = 0.0f;  // 2^100
  uint32_t signs = 0;                         // of the minors, the newest lowest

  /// Takes in one row; `coupling_square` of the first row is any finite number.
  UNCOMP_HD void step(TridiagonalRow<float> row, float x) {
    const float next = (row.diagonal - x) * last - row.coupling_square * before;
    before = last;
    last = next;
    signs = (signs << 1) | (std::bit_cast<uint32_t>(next) >> 31);
  }
  /// The power of two that brings the larger of the last two to 2^100 .. 2^101, or at least nearer to it.
  UNCOMP_HD float scale() const {
    const float larger = std::fmax(std::fabs(last), std::fabs(before));
    const uint32_t field = kTarget - (std::bit_cast<uint32_t>(larger) & kExponent);
    return std::bit_cast<float>(min_of(field, kLargest));
  }
  /// May follow some rows behind the call of `scale` whose value it takes: the recurrence is linear.
  UNCOMP_HD void rescale(float scale) {
    last *= scale;
    before *= scale;
  }
  /// Eigenvalues that the last `rows` rows, at most 31, have added to those below x.
  UNCOMP_HD int negative_pivots(int rows) const {
    const uint32_t changes = (signs ^ (signs >> 1)) & ((1u << rows) - 1u);
#if defined(__CUDA_ARCH__)
    return __popc(changes);
#else
    return std::popcount(changes);
#endif
  }
};

/// A row that is never below x: it pads matrices to a multiple of SturmMinors::kStride rows. x <= 4.
inline constexpr TridiagonalRow<float> kSturmPadding = {8.0f, 0.0f};

/// An interval [low, high] that holds an eigenvalue, cut by equally spaced probes.
template <class T>
struct Bracket {
  T low, high;

  UNCOMP_HD T probe(int i, int probes) const { return low + (high - low) * (T(i + 1) / T(probes + 1)); }

  /// `reached`: how many of the probes are not above the eigenvalue.
  UNCOMP_HD void narrow(int reached, int probes) {
    const T new_low = reached == 0 ? low : probe(reached - 1, probes);
    high = reached == probes ? high : probe(reached, probes);
    low = new_low;
  }

  /// An interval that never left 0 holds nothing but rounding.
  UNCOMP_HD T value() const { return low > T(0) ? T(0.5) * (low + high) : T(0); }
};

/// Row i's share of the upper bound on all eigenvalues: the disc of Gershgorin's theorem. The bound is the maximum.
template <class T>
UNCOMP_HD inline T gershgorin_reach(const TridiagonalRow<T>* rows, int n, int i) {
  const T left = i > 0 ? std::sqrt(rows[i].coupling_square) : T(0);
  const T right = i + 1 < n ? std::sqrt(rows[i + 1].coupling_square) : T(0);
  return rows[i].diagonal + left + right;
}

/// A bound from above, a little wider than the discs so that the largest eigenvalue lies inside.
template <class T>
UNCOMP_HD inline Bracket<T> nonnegative_bracket(T reach) {
  return {T(0), max_of(reach, T(0)) * (T(1) + T(4) * std::numeric_limits<T>::epsilon())};
}

/// Writes the `top` largest eigenvalues of a positive semidefinite matrix, descending; what is below 0 becomes 0.
template <class T>
void top_eigenvalues(const TridiagonalRow<T>* rows, int n, int top, T* out) {
  constexpr int kProbes = 8;
  // 9-fold narrowing until the interval is a few units in the last place of the largest eigenvalue.
  constexpr int kRounds = sizeof(T) == 4 ? 8 : 16;
  T reach = T(0);
  for (int i = 0; i < n; ++i) reach = max_of(reach, gershgorin_reach(rows, n, i));
  const Bracket<T> whole = nonnegative_bracket(reach);
  for (int r = 0; r < top; ++r) {
    Bracket<T> bracket = whole;
    for (int round = 0; round < kRounds; ++round) {
      // All probes walk the rows side by side, so that their divisions overlap.
      T x[kProbes], pivot[kProbes];
      int below[kProbes];
      for (int p = 0; p < kProbes; ++p) {
        x[p] = bracket.probe(p, kProbes);
        pivot[p] = rows[0].diagonal - x[p];
        below[p] = std::signbit(pivot[p]) ? 1 : 0;
      }
      for (int i = 1; i < n; ++i) {
        for (int p = 0; p < kProbes; ++p) {
          pivot[p] = (rows[i].diagonal - x[p]) - rows[i].coupling_square * (T(1) / pivot[p]);
          below[p] += std::signbit(pivot[p]) ? 1 : 0;
        }
      }
      int reached = 0;
      for (int p = 0; p < kProbes; ++p) reached += n - below[p] > r ? 1 : 0;
      bracket.narrow(reached, kProbes);
    }
    out[r] = bracket.value();
  }
}

}  // namespace uncomp
