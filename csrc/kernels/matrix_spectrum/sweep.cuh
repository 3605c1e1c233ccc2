// SPDX-License-Identifier: Apache-2.0
// Householder reduction of a symmetric matrix that lies in the registers of one or several blocks. One sweep over the
// registers does the rank-2 update of a step and the matrix-vector product of the next one, so that a column costs one
// exchange between the threads. The product is taken with the bare column c; that of the reflector v = c - beta e
// follows from it by one more column of the matrix. So the length of c is found while the sweep runs, not before it.
#pragma once

#include "core/householder.h"
#include "core/sturm.h"
#include "kernels/matrix_spectrum/eigen.cuh"

namespace uncomp::kernels {

/// How the matrix is dealt out. Thread `t` of group `g` owns, of every kSpan rows, the kRowRun from kRowRun * g on, and
/// of every kSpan columns the kColumnRun from kColumnRun * t on. Threads are numbered t first. Spans that are done are
/// skipped, each with loops of its own.
template <int kTile_, int kLanes_, int kBlocks_, int kSpan_>
struct Dealing {
  static constexpr int kTile = kTile_, kLanes = kLanes_, kBlocks = kBlocks_, kSpan = kSpan_, kThreads = 128;
  static constexpr int kBlockGroups = kThreads / kLanes, kGroups = kBlockGroups * kBlocks;
  static constexpr int kRowRun = kSpan / kGroups, kColumnRun = kSpan / kLanes;
  static constexpr int kRows = kTile / kSpan * kRowRun, kColumns = kTile / kSpan * kColumnRun;
  static_assert(kRowRun * kGroups == kSpan && kColumnRun * kLanes == kSpan);

  __device__ static constexpr int row(int r, int g) { return kSpan * (r / kRowRun) + kRowRun * g + r % kRowRun; }
  __device__ static constexpr int column(int c, int t) {
    return kSpan * (c / kColumnRun) + kColumnRun * t + c % kColumnRun;
  }

  // While rows and columns from kSpan * block on are alive: a thread's first of each, and its rows as a power of two.
  static constexpr int first_row(int block) { return kRowRun * block; }
  static constexpr int first_column(int block) { return kColumnRun * block; }
  static constexpr int sums(int block) {
    int count = 1;
    while (count < kRows - first_row(block)) count *= 2;
    return count;
  }
};

/// The entries of a vector at a thread's rows and columns.
template <class D>
struct Slice {
  float row[D::kRows], column[D::kColumns];
};

template <class D>
struct MatrixState {
  float a[D::kRows][D::kColumns];
  Slice<D> c;     // the column that is to be cleared, below the diagonal; 0 from there up
  Slice<D> u, z;  // A - u z^T - z u^T is due
};

/// What an exchange brings: the next column of the matrix and A c.
template <class D>
struct Incoming {
  Slice<D> a, y;
  float a_first, y_first;  // at the first row that is alive
  float along;             // c . A c
};

/// x[q] with a run-time q; kCount is 2 or 4.
template <int kCount>
__device__ __forceinline__ float pick(const float* x, int q) {
  const float low = q % 2 == 0 ? x[0] : x[1];
  if constexpr (kCount == 2) return low;
  const float high = q % 2 == 0 ? x[2] : x[3];
  return q < 2 ? low : high;
}

/// Loads the matrix times `scale`, and its first column.
template <class D>
__device__ __forceinline__ void load_matrix(MatrixState<D>& s, const float* source, int g, int t) {
#pragma unroll
  for (int r = 0; r < D::kRows; ++r) {
    const int i = D::row(r, g);
#pragma unroll
    for (int c = 0; c < D::kColumns; c += D::kColumnRun) {
      const float* from = source + i * D::kTile + D::column(c, t);
      if constexpr (D::kColumnRun == 4) {
        *reinterpret_cast<float4*>(&s.a[r][c]) = *reinterpret_cast<const float4*>(from);
      } else {
        *reinterpret_cast<float2*>(&s.a[r][c]) = *reinterpret_cast<const float2*>(from);
      }
    }
    s.c.row[r] = source[i];
    s.u.row[r] = s.z.row[r] = 0.0f;
  }
#pragma unroll
  for (int c = 0; c < D::kColumns; ++c) {
    s.c.column[c] = source[D::column(c, t)];
    s.u.column[c] = s.z.column[c] = 0.0f;
  }
}

template <class D>
__device__ __forceinline__ void scale_matrix(MatrixState<D>& s, float scale, int g, int t) {
#pragma unroll
  for (int r = 0; r < D::kRows; ++r) {
#pragma unroll
    for (int c = 0; c < D::kColumns; ++c) s.a[r][c] *= scale;
    s.c.row[r] = D::row(r, g) == 0 ? 0.0f : s.c.row[r] * scale;
  }
#pragma unroll
  for (int c = 0; c < D::kColumns; ++c) s.c.column[c] = D::column(c, t) == 0 ? 0.0f : s.c.column[c] * scale;
}

/// Clears the columns `first` - 1 with first in kSpan * [kBlock, kBlock + 1) and all behind them: earlier rows and
/// columns are done. Writes rows 1 .. n - 1 of the tridiagonal matrix to every block's `rows`.
///
/// Dead entries within the first span that is alive are never read as numbers that matter, and stay finite: c and u are
/// 0 there, so a dead row only meets reflections from the right.
template <class D, int kBlock, class Exchange>
__device__ __forceinline__ void reduce_columns(MatrixState<D>& s, const Exchange& exchange, TridiagonalRow<float>* rows,
                                               int g, int t, int n) {
  constexpr int kRow = D::first_row(kBlock), kColumn = D::first_column(kBlock), kSums = D::sums(kBlock);
  const int lane = threadIdx.x % 32, last = min_of(D::kSpan * (kBlock + 1), n) - 1;
#pragma unroll 1
  for (int first = max_of(D::kSpan * kBlock, 1); first <= last; ++first) {
    const int local = first % D::kSpan;

    // The reflector. Every thread computes it alike; the sweep hides the chain.
    float square = 0.0f;
#pragma unroll
    for (int c = kColumn; c < D::kColumns; ++c) square += s.c.column[c] * s.c.column[c];
    square = lane_sum<D::kLanes>(square);
    const float alpha = __shfl_sync(kFullWarp, pick<D::kColumnRun>(&s.c.column[kColumn], local % D::kColumnRun),
                                    lane / D::kLanes * D::kLanes + local / D::kColumnRun);
    const Reflector<float> reflector = make_reflector(alpha, square);

    float y[kSums] = {};
    float along = 0.0f;
#pragma unroll
    for (int r = kRow; r < D::kRows; ++r) {
#pragma unroll
      for (int c = kColumn; c < D::kColumns; ++c) {
        s.a[r][c] -= s.u.row[r] * s.z.column[c];
        s.a[r][c] -= s.z.row[r] * s.u.column[c];
        y[r - kRow] += s.a[r][c] * s.c.column[c];
      }
    }
#pragma unroll
    for (int r = kRow; r < D::kRows; ++r) along += s.c.row[r] * y[r - kRow];

    Incoming<D> in;
    exchange.template run<kBlock>(s, y, along, first, in);

    // u = tau v and z = A v - half u with half = (v . A v) / 2. What waits for `half` is kept short.
    const float half = 0.5f * in.along - reflector.beta * (in.y_first - 0.5f * reflector.beta * in.a_first);
    const float u_first = reflector.tau * reflector.head, w_first = in.y_first - reflector.beta * in.a_first;
    const float z_first = w_first - half * u_first, share = half * u_first - z_first;
    const auto advance = [&](int i, bool edge, float a, float y, float& c, float& u, float& z) {
      u = reflector.tau * (edge && i == first ? reflector.head : c);
      const float w = y - reflector.beta * a;
      const float next = (a - u_first * w) + share * u;
      z = w - half * u;
      c = edge && i <= first ? 0.0f : next;
    };
#pragma unroll
    for (int r = kRow; r < D::kRows; ++r) {
      advance(D::row(r, g), r < kRow + D::kRowRun, in.a.row[r], in.y.row[r], s.c.row[r], s.u.row[r], s.z.row[r]);
    }
#pragma unroll
    for (int c = kColumn; c < D::kColumns; ++c) {
      advance(D::column(c, t), c < kColumn + D::kColumnRun, in.a.column[c], in.y.column[c], s.c.column[c],
              s.u.column[c], s.z.column[c]);
    }
    if (threadIdx.x == 0) {
      rows[first] = {in.a_first - 2.0f * u_first * z_first, max_of(square, kCouplingFloor<float>)};
    }
  }
  if constexpr (D::kSpan * (kBlock + 1) < D::kTile) reduce_columns<D, kBlock + 1>(s, exchange, rows, g, t, n);
}

/// Loads matrix `source` [kTile, kTile], scales it to a trace of 1 and reduces it: `rows` [sturm_rows(n)] in shared
/// memory holds the tridiagonal matrix behind the next barrier. False where `out` is written and nothing is left to do.
template <class D, class Exchange>
__device__ __forceinline__ bool tridiagonal_rows(const float* source, const Exchange& exchange,
                                                 TridiagonalRow<float>* rows, int g, int t, int n, int top,
                                                 float* out) {
  MatrixState<D> s;
  load_matrix(s, source, g, t);
  const float trace = warp_trace<D::kTile>(source, n), corner = source[0];
  if (write_degenerate(trace, top, out)) return false;
  const float scale = 1.0f / trace;
  scale_matrix(s, scale, g, t);
  if (threadIdx.x == 0) rows[0] = {corner * scale, 0.0f};
  if (n + static_cast<int>(threadIdx.x) < sturm_rows(n)) rows[n + threadIdx.x] = kSturmPadding;
  reduce_columns<D, 0>(s, exchange, rows, g, t, n);
  return true;
}

}  // namespace uncomp::kernels
