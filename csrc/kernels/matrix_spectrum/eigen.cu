// SPDX-License-Identifier: Apache-2.0
// Eigenvalues of matrices of at most 128 x 128, one block each; larger ones go to a cluster, or to a block that keeps
// the matrix in shared memory.
#include "kernels/common/dependent.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/matrix_spectrum/stages.h"
#include "kernels/matrix_spectrum/sturm.cuh"
#include "kernels/matrix_spectrum/sweep.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

template <int kTile>
using BlockDealing = Dealing<kTile, 8, 1, 16>;

template <int kTile>
struct EigenShared {
  // Two of each in turn: a thread may be a column ahead of the readers.
  alignas(16) float2 found[2][kTile];  // A c and the next column
  alignas(16) float along[2][16];      // c . A c, a summand per group
  alignas(16) TridiagonalRow<float> rows[kTile];
  int reached[kThreadProbes * 128];
};

/// A predicated store: a branch would end the run of instructions that hide each other's latency.
__device__ __forceinline__ void store_if(bool condition, float* p, float x) {
  asm volatile("{\n.reg .pred yes;\nsetp.ne.s32 yes, %0, 0;\n@yes st.shared.f32 [%1], %2;\n}\n" ::"r"(
                   static_cast<int>(condition)),
               "r"(shared_address(p)), "f"(x)
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
    static_assert(D::kRowRun == 1 && D::kColumnRun == 2 && D::kGroups == 16);
    constexpr int kRow = D::first_row(kBlock), kColumn = D::first_column(kBlock);
    const int buffer = first % 2;
    float2* found = shared.found[buffer];
    // Row `first` stands for the column.
#pragma unroll
    for (int c = kColumn; c < D::kColumns; ++c) {
      store_if(g == first % D::kSpan, &found[D::column(c, t)].y, s.a[kRow][c]);
    }
    along = lane_sum<D::kLanes>(along);
    if (t == 0) shared.along[buffer][g] = along;
    const int row = kRow + summed_row<D::kLanes, kSums>(t);
    const float total = sum_rows<D::kLanes>(y, t);
    if (kRow + kSums == D::kRows || row < D::kRows) found[D::row(row, g)].x = total;
    __syncthreads();

    float part[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float4 x = *reinterpret_cast<const float4*>(&shared.along[buffer][4 * q]);
      part[q] = (x.x + x.y) + (x.z + x.w);
    }
    const float2 edge = found[first];
    in.y_first = edge.x;
    in.a_first = edge.y;
#pragma unroll
    for (int r = kRow; r < D::kRows; ++r) {
      const float2 x = found[D::row(r, g)];
      in.y.row[r] = x.x;
      in.a.row[r] = x.y;
    }
#pragma unroll
    for (int c = kColumn; c < D::kColumns; c += 2) {
      const float4 x = *reinterpret_cast<const float4*>(&found[D::column(c, t)]);
      in.y.column[c] = x.x;
      in.a.column[c] = x.y;
      in.y.column[c + 1] = x.z;
      in.a.column[c + 1] = x.w;
    }
    in.along = (part[0] + part[1]) + (part[2] + part[3]);
  }
};

template <int kTile>
__global__ void __launch_bounds__(128, 2) eigen_kernel(const float* gram, float* spectrum, int n, int top) {
  using D = BlockDealing<kTile>;
  __shared__ EigenShared<kTile> shared;
  const int g = threadIdx.x / D::kLanes, t = threadIdx.x % D::kLanes;
  const float* source = gram + static_cast<int64_t>(blockIdx.x) * kTile * kTile;
  float* out = spectrum + static_cast<int64_t>(blockIdx.x) * top;
  wait_for_previous();
  if (!tridiagonal_rows<D>(source, BlockExchange<kTile>{shared, g, t}, shared.rows, g, t, n, top, out)) return;
  __syncthreads();
  write_eigenvalues<D::kThreads>(shared.rows, n, 0, top, top, out, shared.reached);
}

template <int kTile>
cudaError_t launch(const MatrixSpectrumParams& params, const float* gram, cudaStream_t stream) {
  const auto kernel = eigen_kernel<kTile>;
  DeviceInfo device{};
  if (const cudaError_t err = device_info(&device); err != cudaSuccess) return err;
  bool early = false;
  if (const cudaError_t err = compiled_for_sm_90(reinterpret_cast<const void*>(kernel), &early); err != cudaSuccess) {
    return err;
  }
  // Blocks that start early go where the kernel before them leaves room, and two on a multiprocessor take twice as
  // long: where there are enough for all, a block asks for more than half of the shared memory.
  const int64_t matrices = int64_t{params.batch} * params.heads;
  const size_t bytes = early && matrices <= device.sm_count ? static_cast<size_t>(device.smem_per_block / 2 + 1024) : 0;
  if (const cudaError_t err = allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes); err != cudaSuccess) {
    return err;
  }
  return launch_dependent(kernel, early, static_cast<unsigned>(matrices), BlockDealing<kTile>::kThreads, bytes, stream,
                          gram, params.spectrum, static_cast<int>(params.dim), static_cast<int>(params.top));
}

}  // namespace

cudaError_t eigenvalues(const MatrixSpectrumParams& params, const SpectrumPlan& plan, const float* gram,
                        cudaStream_t stream) {
  switch (plan.tile) {
    case 64:
      return launch<64>(params, gram, stream);
    case 128:
      return launch<128>(params, gram, stream);
    case 256: {
      bool done = false;
      const cudaError_t err = cluster_eigenvalues(params, gram, stream, &done);
      return err != cudaSuccess || done ? err : packed_eigenvalues(params, gram, stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace uncomp::kernels
