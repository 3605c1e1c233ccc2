// SPDX-License-Identifier: Apache-2.0
// Eigenvalues of matrices of 129 to 256 channels, one block each, where no cluster can hold
// them. The lower triangle lies packed in shared memory: row
// i starts at i (i + 1) / 2, and 32 neighbouring rows of one column fall into 32 different banks, because triangular
// numbers run through all residues of a power of two. Two threads a row take turns at blocks of 4 columns.
#include "core/householder.h"
#include "kernels/matrix_spectrum/eigen.cuh"
#include "kernels/matrix_spectrum/stages.h"
#include "kernels/matrix_spectrum/sturm.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kTile = 256;
constexpr int kThreads = 2 * kTile;

__host__ __device__ constexpr int row_start(int i) { return i * (i + 1) / 2; }

struct PackedShared {
  alignas(16) float v[kTile];
  alignas(16) float w[kTile];
  float product[2][kTile];  // A v, the two threads of a row
  alignas(16) TridiagonalRow<float> rows[kTile];
  int reached[kThreadProbes * kThreads];
  float a[row_start(kTile)];  // lower triangle
};
static_assert(sizeof(PackedShared) <= 163 * 1024);

__global__ void __launch_bounds__(kThreads, 1) packed_eigen_kernel(const float* gram, float* spectrum, int n, int top) {
  extern __shared__ __align__(16) unsigned char bytes[];
  PackedShared& shared = *reinterpret_cast<PackedShared*>(bytes);
  float* a = shared.a;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int i = thread % kTile, part = thread / kTile;  // row of this thread, and which of its two threads
  const float* source = gram + static_cast<int64_t>(blockIdx.x) * kTile * kTile;
  float* out = spectrum + static_cast<int64_t>(blockIdx.x) * top;
  const float trace = warp_trace<kTile>(source, n);
  if (write_degenerate(trace, top, out)) return;
  const float scale = 1.0f / trace;

  // All 256 rows: those behind n are zero, so that a block of 4 columns may reach into them.
  for (int r = warp; r < kTile; r += kThreads / 32) {
    for (int c = lane; c <= r; c += 32) a[row_start(r) + c] = source[r * kTile + c] * scale;
  }
  if (thread == 0) shared.rows[0].coupling_square = 0.0f;
  if (n + thread < sturm_rows(n)) shared.rows[n + thread] = kSturmPadding;
  __syncthreads();

  for (int next = 1; next < n; ++next) {
    const int column = next - 1;
    // Reflector; every warp computes it alike.
    float square = 0.0f;
    for (int r = next + lane; r < n; r += 32) {
      const float x = a[row_start(r) + column];
      square += x * x;
    }
    square = warp_sum(square);
    const Reflector<float> reflector = make_reflector(a[row_start(next) + column], square);
    if (thread == 0) {
      shared.rows[column].diagonal = a[row_start(column) + column];
      shared.rows[next].coupling_square = max_of(square, kCouplingFloor<float>);
    }
    if (reflector.tau == 0.0f) continue;  // the whole block, which has changed nothing
    const bool alive = i >= next && i < n;
    const float v = !alive ? 0.0f : (i == next ? reflector.head : a[row_start(i) + column]);
    if (part == 0) shared.v[i] = v;
    __syncthreads();

    // A v. Entries behind the diagonal are read from the other triangle.
    if (alive) {
      float sum = 0.0f;
      for (int j = (next & ~3) + 4 * part; j < n; j += 8) {
        const float4 x = *reinterpret_cast<const float4*>(shared.v + j);
        const float each[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          sum += each[q] * a[j + q <= i ? row_start(i) + j + q : row_start(j + q) + i];
        }
      }
      shared.product[part][i] = sum;
    }
    __syncthreads();

    // w = tau A v - (tau^2 / 2) (v^T A v) v
    float dot = 0.0f;
    for (int r = next + lane; r < n; r += 32) dot += shared.v[r] * (shared.product[0][r] + shared.product[1][r]);
    const float along = 0.5f * reflector.tau * (reflector.tau * warp_sum(dot));
    const float w = alive ? reflector.tau * (shared.product[0][i] + shared.product[1][i]) - along * v : 0.0f;
    if (part == 0) shared.w[i] = w;
    __syncthreads();

    // A - v w^T - w v^T; left of `next` both vectors are zero.
    if (alive) {
      for (int j = (next & ~3) + 4 * part; j <= i; j += 8) {
        const float4 x = *reinterpret_cast<const float4*>(shared.v + j);
        const float4 y = *reinterpret_cast<const float4*>(shared.w + j);
        const float each_v[4] = {x.x, x.y, x.z, x.w}, each_w[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          if (j + q <= i) a[row_start(i) + j + q] -= v * each_w[q] + w * each_v[q];
        }
      }
    }
    __syncthreads();
  }
  if (thread == 0) shared.rows[n - 1].diagonal = a[row_start(n - 1) + n - 1];
  __syncthreads();
  write_eigenvalues<kThreads>(shared.rows, n, 0, top, top, out, shared.reached);
}

}  // namespace

cudaError_t packed_eigenvalues(const MatrixSpectrumParams& params, const float* gram, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(PackedShared);
  if (const cudaError_t err = allow_shared_memory(reinterpret_cast<const void*>(packed_eigen_kernel), kBytes);
      err != cudaSuccess) {
    return err;
  }
  const unsigned matrices = static_cast<unsigned>(params.batch) * params.heads;
  packed_eigen_kernel<<<matrices, kThreads, kBytes, stream>>>(gram, params.spectrum, params.dim, params.top);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
