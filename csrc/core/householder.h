// SPDX-License-Identifier: Apache-2.0
// Householder reflectors, and the reduction of a symmetric matrix to a tridiagonal one with the same eigenvalues.
// Entries are expected to be at most about 1 in size: what underflows when squared is then below every tolerance.
#pragma once

#include <cmath>
#include <limits>

#include "core/math.h"

namespace uncomp {

/// H = I - tau * v * v^T with v = (1, scale * tail) turns the column (alpha, tail) into (beta, 0, ..., 0).
template <class T>
struct Reflector {
  T tau;    // 0 leaves the column as it is
  T scale;  // of the tail
  T beta;   // what becomes of alpha; the sign is chosen against cancellation
};

/// `tail_square` is the sum of the squares of the column behind alpha.
template <class T>
UNCOMP_HD inline Reflector<T> make_reflector(T alpha, T tail_square) {
  if (!(tail_square > std::numeric_limits<T>::min())) return {T(0), T(0), alpha};
  const T norm = std::sqrt(alpha * alpha + tail_square);
  const T beta = alpha > T(0) ? -norm : norm;
  return {(beta - alpha) / beta, T(1) / (alpha - beta), beta};
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
    T tail_square = T(0);
    for (int i = k + 2; i < n; ++i) tail_square += row[i] * row[i];
    const Reflector<T> reflector = make_reflector(row[k + 1], tail_square);
    coupling[k + 1] = reflector.beta;
    if (reflector.tau == T(0)) continue;
    v[k + 1] = T(1);
    for (int i = k + 2; i < n; ++i) v[i] = row[i] * reflector.scale;

    // w = tau * A v - (tau^2 / 2) (v^T A v) v, so that H A H = A - v w^T - w v^T.
    for (int j = k + 1; j < n; ++j) w[j] = T(0);
    for (int i = k + 1; i < n; ++i) {
      const T* a_i = a + static_cast<int64_t>(i) * n;
      const T v_i = v[i];
      for (int j = k + 1; j < n; ++j) w[j] += v_i * a_i[j];
    }
    T dot = T(0);
    for (int j = k + 1; j < n; ++j) dot += v[j] * w[j];
    const T along = T(0.5) * reflector.tau * reflector.tau * dot;
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
