// SPDX-License-Identifier: Apache-2.0
// Eigenvalues of matrices of at most 128 x 128, one block each. The matrix lies in registers, dealt out in blocks of
// 2 x 2: thread (ti, tj) of 16 x 16 owns rows 32 R + 2 ti + {0, 1} and columns 32 C + 2 tj + {0, 1}. A column of the
// Householder reduction costs two barriers: one behind the published column, one behind the matrix-vector product.
#include <cmath>

#include "core/householder.h"
#include "kernels/common/reduce.cuh"
#include "kernels/matrix_spectrum/eigen.cuh"
#include "kernels/matrix_spectrum/stages.h"
#include "kernels/matrix_spectrum/sturm.cuh"

namespace uncomp::kernels {
namespace {

constexpr int kThreads = 256;

template <int kTile>
struct EigenShared {
  alignas(16) float column[kTile];   // published column of the matrix
  alignas(16) float product[kTile];  // A v
  TridiagonalRow<float> rows[kTile];
  int reached[kThreads];
};

/// Columns `next` - 1 with next in [32 kFirst, 32 kFirst + 32): only rows and columns from 32 kFirst on are alive.
template <int kTile, int kFirst>
__device__ __forceinline__ void reduce_columns(float (&a)[kTile / 16][kTile / 16], EigenShared<kTile>& shared, int n) {
  constexpr int kSide = kTile / 16, kAlive = 2 * kFirst, kParts = kTile / 32;
  const int lane = threadIdx.x % 32, ti = threadIdx.x / 16, tj = threadIdx.x % 16;
  const int last = min_of(32 * kFirst + 31, n - 1);
  for (int next = max_of(32 * kFirst, 1); next <= last; ++next) {
    // Reflector of column next - 1; every warp computes it alike.
    float tail[kParts], tail_square = 0.0f;
#pragma unroll
    for (int q = kFirst; q < kParts; ++q) {
      tail[q] = lane + 32 * q > next ? shared.column[lane + 32 * q] : 0.0f;
      tail_square += tail[q] * tail[q];
    }
    const Reflector<float> reflector = make_reflector(shared.column[next], warp_sum(tail_square));
    const bool turn = reflector.tau != 0.0f;
    if (threadIdx.x == 0) {
      shared.rows[next - 1].diagonal = shared.column[next - 1];
      shared.rows[next].coupling_square = tridiagonal_row(0.0f, reflector.beta).coupling_square;
    }
    const auto entry = [&](int i, float x) { return i > next ? x * reflector.scale : (i == next ? 1.0f : 0.0f); };

    // v at this thread's rows and columns, then A v: own columns first, then over the 16 threads of a row.
    float v_row[kSide], v_column[kSide];
    if (turn) {
      float y[kSide] = {};
#pragma unroll
      for (int r = kAlive; r < kSide; r += 2) {
        const int i = 16 * r + 2 * ti, j = 16 * r + 2 * tj;
        const float2 x = *reinterpret_cast<const float2*>(shared.column + i);
        v_row[r] = entry(i, x.x);
        v_row[r + 1] = entry(i + 1, x.y);
        const float2 z = *reinterpret_cast<const float2*>(shared.column + j);
        v_column[r] = entry(j, z.x);
        v_column[r + 1] = entry(j + 1, z.y);
      }
#pragma unroll
      for (int r = kAlive; r < kSide; ++r) {
#pragma unroll
        for (int c = kAlive; c < kSide; ++c) y[r] += a[r][c] * v_column[c];
      }
      int row = 0;
      const float total = sum_rows<kSide>(y, tj, &row);
      if (tj % (16 / kSide) == 0) shared.product[32 * (row / 2) + 2 * ti + row % 2] = total;
    }
    __syncthreads();

    // A - v w^T - w v^T with w = tau A v - (tau^2 / 2) (v^T A v) v.
    if (turn) {
      float dot = 0.0f;
#pragma unroll
      for (int q = kFirst; q < kParts; ++q) {
        const int i = lane + 32 * q;
        dot += i >= next ? entry(i, tail[q]) * shared.product[i] : 0.0f;
      }
      const float along = 0.5f * reflector.tau * reflector.tau * warp_sum(dot);
      const auto weight = [&](int i, float y, float v) { return i >= next ? reflector.tau * y - along * v : 0.0f; };
      float w_row[kSide];
#pragma unroll
      for (int r = kAlive; r < kSide; r += 2) {
        const int i = 16 * r + 2 * ti;
        const float2 y = *reinterpret_cast<const float2*>(shared.product + i);
        w_row[r] = weight(i, y.x, v_row[r]);
        w_row[r + 1] = weight(i + 1, y.y, v_row[r + 1]);
      }
#pragma unroll
      for (int c = kAlive; c < kSide; c += 2) {
        const int j = 16 * c + 2 * tj;
        const float2 y = *reinterpret_cast<const float2*>(shared.product + j);
        const float w[2] = {weight(j, y.x, v_column[c]), weight(j + 1, y.y, v_column[c + 1])};
#pragma unroll
        for (int r = kAlive; r < kSide; ++r) {
#pragma unroll
          for (int q = 0; q < 2; ++q) a[r][c + q] -= v_row[r] * w[q] + w_row[r] * v_column[c + q];
        }
      }
    }
    // Nobody reads the old column any more.
    if (tj == next % 32 / 2) {
#pragma unroll
      for (int r = kAlive; r < kSide; ++r) {
        shared.column[32 * (r / 2) + 2 * ti + r % 2] = next % 2 != 0 ? a[r][kAlive + 1] : a[r][kAlive];
      }
    }
    __syncthreads();
  }
  if constexpr (32 * (kFirst + 1) < kTile) reduce_columns<kTile, kFirst + 1>(a, shared, n);
}

template <int kTile>
__global__ void __launch_bounds__(kThreads, 2) eigen_kernel(const float* gram, float* spectrum, int n, int top) {
  constexpr int kSide = kTile / 16;
  __shared__ EigenShared<kTile> shared;
  const int ti = threadIdx.x / 16, tj = threadIdx.x % 16;
  const float* source = gram + static_cast<int64_t>(blockIdx.x) * kTile * kTile;
  float* out = spectrum + static_cast<int64_t>(blockIdx.x) * top;
  const float trace = warp_trace<kTile>(source, n);
  if (write_degenerate(trace, top, out)) return;
  const float scale = 1.0f / trace;

  float a[kSide][kSide];
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
    const int i = 32 * (r / 2) + 2 * ti + r % 2;
#pragma unroll
    for (int c = 0; c < kSide; c += 2) {
      const float2 x = *reinterpret_cast<const float2*>(source + i * kTile + 16 * c + 2 * tj);
      a[r][c] = x.x * scale;
      a[r][c + 1] = x.y * scale;
    }
    if (tj == 0) shared.column[i] = a[r][0];
  }
  if (threadIdx.x == 0) shared.rows[0].coupling_square = 0.0f;
  __syncthreads();
  reduce_columns<kTile, 0>(a, shared, n);
  if (threadIdx.x == 0) shared.rows[n - 1].diagonal = shared.column[n - 1];
  __syncthreads();
  write_top_eigenvalues<kThreads>(shared.rows, n, top, out, shared.reached);
}

}  // namespace

cudaError_t eigenvalues(const MatrixSpectrumParams& params, const SpectrumPlan& plan, const float* gram,
                        cudaStream_t stream) {
  const unsigned matrices = static_cast<unsigned>(params.batch) * params.heads;
  switch (plan.tile) {
    case 64:
      eigen_kernel<64><<<matrices, kThreads, 0, stream>>>(gram, params.spectrum, params.dim, params.top);
      return cudaGetLastError();
    case 128:
      eigen_kernel<128><<<matrices, kThreads, 0, stream>>>(gram, params.spectrum, params.dim, params.top);
      return cudaGetLastError();
    case 256:
      return large_eigenvalues(params, gram, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace uncomp::kernels
