// SPDX-License-Identifier: Apache-2.0
// Householder reflectors, and the reduction of a symmetric matrix to a tridiagonal one with the same eigenvalues.
// Entries are expected to be at most about 1 in size: what underflows when squared is then below every tolerance.
#pragma once

#include <cmath>

#include "core/math.h"

namespace uncomp {

/// H = I - tau * v * v^T with v = (head, tail) turns the column (alpha, tail) into (beta, 0, ..., 0).
template <class T>
struct Reflector {
  T tau;   // 0 leaves the column as it is
  T beta;  // what becomes of alpha; the sign is chosen against cancellation. 0 where tau is 0
  T head;  // alpha - beta
};

/// Squares up to this count as a column of zeros: tau and what is multiplied with it stay far from overflow.
template <class T>
inline constexpr T kReflectorFloor = sizeof(T) == 4 ? T(1e-24) : T(1e-100);

/// 1 / x to the last bit or the last but one; on the device without a slow path for what a reflector never meets.
template <class T>
UNCOMP_HD inline T quick_reciprocal(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r + r * (1.0f - x * r);
  }
#endif
  return T(1) / x;
}

/// Square root, likewise. x > 0.
template <class T>
UNCOMP_HD inline T quick_sqrt(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    const float root = x * r;
    return root + 0.5f * r * (x - root * root);
  }
#endif
  return std::sqrt(x);
}

/// `square` is the sum of the squares of the whole column, alpha's included. The tail of v is the column's own: nothing
/// has to be scaled before the matrix is multiplied with v.
template <class T>
UNCOMP_HD inline Reflector<T> make_reflector(T alpha, T square) {
  const bool turn = square > kReflectorFloor<T>;
  const T norm = quick_sqrt(square), beta = alpha > T(0) ? -norm : norm;
  const T tau = quick_reciprocal(square + (alpha > T(0) ? alpha : -alpha) * norm);
  return turn ? Reflector<T>{tau, beta, alpha - beta} : Reflector<T>{T(0), T(0), alpha};
}

/// Reduces the symmetric `a` [n, n], row-major and overwritten, to a tridiagonal matrix.
///
/// diagonal  [n]
/// coupling  [n]   coupling[i] joins i - 1 and i; coupling[0] = 0
/// scratch   [2n]
template <class T>
void tridiagonalize(T* a, int n, T* diagonal, T* coupling, T* scratch) {
  T* v = scratch;
  T* w = scratch + n;
  coupling[0] = T(0);
  for (int k = 0; k + 1 < n; ++k) {
    const T* row = a + static_cast<int64_t>(k) * n;  // symmetric: also the column
    diagonal[k] = row[k];
    T square = T(0);
    for (int i = k + 1; i < n; ++i) square += row[i] * row[i];
    const Reflector<T> reflector = make_reflector(row[k + 1], square);
    coupling[k + 1] = reflector.tau == T(0) ? row[k + 1] : reflector.beta;
    if (reflector.tau == T(0)) continue;
    v[k + 1] = reflector.head;
    for (int i = k + 2; i < n; ++i) v[i] = row[i];

    // w = tau * A v - (tau^2 / 2) (v^T A v) v, so that H A H = A - v w^T - w v^T.
    for (int j = k + 1; j < n; ++j) w[j] = T(0);
    for (int i = k + 1; i < n; ++i) {
      const T* a_i = a + static_cast<int64_t>(i) * n;
      const T v_i = v[i];
      for (int j = k + 1; j < n; ++j) w[j] += v_i * a_i[j];
    }
    T dot = T(0);
    for (int j = k + 1; j < n; ++j) dot += v[j] * w[j];
    const T along = T(0.5) * reflector.tau * (reflector.tau * dot);
    for (int j = k + 1; j < n; ++j) w[j] = reflector.tau * w[j] - along * v[j];
    for (int i = k + 1; i < n; ++i) {
      T* a_i = a + static_cast<int64_t>(i) * n;
      const T v_i = v[i], w_i = w[i];
      for (int j = k + 1; j < n; ++j) a_i[j] -= v_i * w[j] + w_i * v[j];
    }
  }
  diagonal[n - 1] = a[static_cast<int64_t>(n - 1) * n + n - 1];
}

}  // namespace uncomp
