// SPDX-License-Identifier: Apache-2.0
// Eigenvalues of matrices of at most 128 x 128, one block each; larger ones go to a cluster, or to a block that keeps
// the matrix in shared memory.
#include "kernels/common/mma.cuh"
#include "kernels/matrix_spectrum/stages.h"
#include "kernels/matrix_spectrum/sturm.cuh"
#include "kernels/matrix_spectrum/sweep.cuh"

namespace uncomp::kernels {
namespace {

template <int kTile>
using BlockDealing = Dealing<kTile, 8, 1>;

template <int kTile>
struct EigenShared {
  // Two of each in turn: a thread may be a column ahead of the readers.
  alignas(16) float column[2][kTile];
  alignas(16) float product[2][kTile];
  alignas(16) float along[2][8];  // a summand per two groups
  alignas(16) TridiagonalRow<float> rows[kTile];
  int reached[kThreadProbes * 128];
};

__device__ __forceinline__ void load(const float* p, float& x, float& y) {
  const float2 two = *reinterpret_cast<const float2*>(p);
  x = two.x;
  y = two.y;
}

__device__ __forceinline__ void load(const float* p, float& x, float& y, float& z, float& w) {
  const float4 four = *reinterpret_cast<const float4*>(p);
  x = four.x;
  y = four.y;
  z = four.z;
  w = four.w;
}

/// A predicated store: a branch would end the run of instructions that hide each other's latency.
__device__ __forceinline__ void store_if(bool condition, float* p, const float (&x)[4]) {
  asm volatile("{\n.reg .pred yes;\nsetp.ne.s32 yes, %0, 0;\n@yes st.shared.v4.f32 [%1], {%2, %3, %4, %5};\n}\n" ::"r"(
                   static_cast<int>(condition)),
               "r"(shared_address(p)), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}

/// Between the threads of one block, through shared memory.
template <int kTile>
struct BlockExchange {
  using D = BlockDealing<kTile>;
  EigenShared<kTile>& shared;
  int g, t;

  template <int kBlock, int kSums>
  __device__ __forceinline__ void run(const MatrixState<D>& s, float (&y)[kSums], float along, int first,
                                      Incoming<D>& in) const {
    static_assert(D::kRowRun == 2 && D::kColumnRun == 4 && D::kGroups == 16);
    constexpr int kRow = D::first_row(kBlock), kColumn = D::first_column(kBlock);
    const int local = first % 32, buffer = first % 2;
    // Row `first` stands for the column.
#pragma unroll
    for (int c = kColumn; c < D::kColumns; c += 4) {
      float x[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) x[q] = local % 2 == 0 ? s.a[kRow][c + q] : s.a[kRow + 1][c + q];
      store_if(g == local / 2, &shared.column[buffer][D::column(c, t)], x);
    }
    along = lane_sum<2 * D::kLanes>(along);
    if (t == 0) shared.along[buffer][g / 2] = along;
    const int row = kRow + summed_row<D::kLanes, kSums>(t);
    const float total = sum_rows<D::kLanes>(y, t);
    if (kRow + kSums == D::kRows || row < D::kRows) shared.product[buffer][D::row(row, g)] = total;
    __syncthreads();

    const float* column = shared.column[buffer];
    const float* product = shared.product[buffer];
    const float4 front = *reinterpret_cast<const float4*>(&shared.along[buffer][0]);
    const float4 back = *reinterpret_cast<const float4*>(&shared.along[buffer][4]);
    in.a_first = column[first];
    in.y_first = product[first];
#pragma unroll
    for (int r = kRow; r < D::kRows; r += 2) {
      load(column + D::row(r, g), in.a.row[r], in.a.row[r + 1]);
      load(product + D::row(r, g), in.y.row[r], in.y.row[r + 1]);
    }
#pragma unroll
    for (int c = kColumn; c < D::kColumns; c += 4) {
      const int j = D::column(c, t);
      load(column + j, in.a.column[c], in.a.column[c + 1], in.a.column[c + 2], in.a.column[c + 3]);
      load(product + j, in.y.column[c], in.y.column[c + 1], in.y.column[c + 2], in.y.column[c + 3]);
    }
    in.half_along = ((front.x + front.y) + (front.z + front.w)) + ((back.x + back.y) + (back.z + back.w));
  }
};

template <int kTile>
__global__ void __launch_bounds__(128, 2) eigen_kernel(const float* gram, float* spectrum, int n, int top) {
  using D = BlockDealing<kTile>;
  __shared__ EigenShared<kTile> shared;
  const int g = threadIdx.x / D::kLanes, t = threadIdx.x % D::kLanes;
  const float* source = gram + static_cast<int64_t>(blockIdx.x) * kTile * kTile;
  float* out = spectrum + static_cast<int64_t>(blockIdx.x) * top;
  if (!tridiagonal_rows<D>(source, BlockExchange<kTile>{shared, g, t}, shared.rows, g, t, n, top, out)) return;
  __syncthreads();
  write_eigenvalues<D::kThreads>(shared.rows, n, 0, top, top, out, shared.reached);
}

}  // namespace

cudaError_t eigenvalues(const MatrixSpectrumParams& params, const SpectrumPlan& plan, const float* gram,
                        cudaStream_t stream) {
  const unsigned matrices = static_cast<unsigned>(params.batch) * params.heads;
  switch (plan.tile) {
    case 64:
      eigen_kernel<64><<<matrices, 128, 0, stream>>>(gram, params.spectrum, params.dim, params.top);
      return cudaGetLastError();
    case 128:
      eigen_kernel<128><<<matrices, 128, 0, stream>>>(gram, params.spectrum, params.dim, params.top);
      return cudaGetLastError();
    case 256: {
      bool done = false;
      const cudaError_t err = cluster_eigenvalues(params, gram, stream, &done);
      return err != cudaSuccess || done ? err : packed_eigenvalues(params, gram, stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace uncomp::kernels
