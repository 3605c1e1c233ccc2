// SPDX-License-Identifier: Apache-2.0
// Eigenvalues of matrices of 129 to 256 channels on sm_90: a cluster of four blocks keeps a matrix in its registers.
// Every block owns 8 of each 32 rows and sends what it found about them to all four; a transaction barrier in each
// counts the bytes, so that no cluster-wide barrier stands between two columns.
#include "kernels/common/cluster.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/matrix_spectrum/stages.h"
#include "kernels/matrix_spectrum/sturm.cuh"
#include "kernels/matrix_spectrum/sweep.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kBlocks = 4, kTile = 256;
using D = Dealing<kTile, 16, kBlocks, 32>;

struct ClusterShared {
  // Two of each in turn: a block may be a column ahead of the readers.
  alignas(16) float2 found[2][kTile];  // A c and the next column
  alignas(16) float along[2][16];      // c . A c, a summand per warp of the cluster
  alignas(16) TridiagonalRow<float> rows[kTile];
  alignas(8) uint64_t arrived[2];
  int reached[kThreadProbes * D::kThreads];
};

#if __CUDA_ARCH__ >= 900
/// The address in block `rank`'s shared memory.
__device__ __forceinline__ uint32_t in_block(const void* p, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared_address(p)), "r"(rank));
  return remote;
}

__device__ __forceinline__ void send(uint32_t to, float x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];\n" ::"r"(to), "f"(x),
               "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void send(uint32_t to, float x, float y, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n" ::"r"(to), "f"(x),
               "f"(y), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

struct ClusterExchange {
  ClusterShared& shared;
  int g, t;

  template <int kBlock, int kSums>
  __device__ __forceinline__ void run(const MatrixState<D>& s, float (&y)[kSums], float along, int first,
                                      Incoming<D>& in) const {
    static_assert(D::kRowRun == 1 && D::kColumnRun == 2 && D::kLanes == 16 && D::kGroups == 32);
    constexpr int kRow = D::first_row(kBlock), kColumn = D::first_column(kBlock);
    constexpr int kShare = D::kLanes / kSums;  // threads that get the same row
    const int lane = threadIdx.x % 32, local = first % 32, buffer = first % 2;
    uint64_t* arrived = &shared.arrived[buffer];
    if (threadIdx.x == 0) expect(arrived, (D::kRows - kRow) * 32 * sizeof(float2) + sizeof(shared.along[0]));

    // Column `first` at this thread's summed row, from the thread of the group that owns it.
    const int mine = summed_row<D::kLanes, kSums>(t), row = kRow + mine;
    float a = 0.0f;
#pragma unroll
    for (int r = kRow; r < D::kRows; ++r) {
      const float x = __shfl_sync(kFullWarp, local % 2 == 0 ? s.a[r][kColumn] : s.a[r][kColumn + 1],
                                  lane / D::kLanes * D::kLanes + local / 2);
      a = r - kRow == mine ? x : a;
    }
    along = warp_sum(along);
    const float total = sum_rows<D::kLanes>(y, t);
    if (kRow + kSums == D::kRows || row < D::kRows) {
      const float2* to = &shared.found[buffer][D::row(row, g)];
      if constexpr (kShare == 2) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const uint32_t rank = 2 * q + t % 2;
          send(in_block(to, rank), total, a, in_block(arrived, rank));
        }
      } else {
        const uint32_t rank = t % kShare;
        if (rank < kBlocks) send(in_block(to, rank), total, a, in_block(arrived, rank));
      }
    }
    if (lane < kBlocks) send(in_block(&shared.along[buffer][g / 2], lane), along, in_block(arrived, lane));
    wait(arrived, (first - 1) / 2 % 2);

    float sum[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float4 x = *reinterpret_cast<const float4*>(&shared.along[buffer][4 * q]);
      sum[q] = (x.x + x.y) + (x.z + x.w);
    }
    const float2* found = shared.found[buffer];
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
    in.along = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
};
#endif

__global__ void __launch_bounds__(D::kThreads, 2)
    cluster_eigen_kernel(const float* gram, float* spectrum, int n, int top) {
#if __CUDA_ARCH__ >= 900
  __shared__ ClusterShared shared;
  const int rank = blockIdx.x % kBlocks, matrix = blockIdx.x / kBlocks;
  const int g = rank * D::kBlockGroups + threadIdx.x / D::kLanes, t = threadIdx.x % D::kLanes;
  const float* source = gram + static_cast<int64_t>(matrix) * kTile * kTile;
  float* out = spectrum + static_cast<int64_t>(matrix) * top;
  if (threadIdx.x == 0) {
    for (int q = 0; q < 2; ++q) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n" ::"r"(shared_address(&shared.arrived[q])) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  cluster_barrier();
  if (!tridiagonal_rows<D>(source, ClusterExchange{shared, g, t}, shared.rows, g, t, n, top, out)) return;
  __syncthreads();
  // Every block has the whole tridiagonal matrix and takes a share of the eigenvalues. Nothing is sent any more: what
  // others sent has been waited for.
  const int share = ceil_div(top, kBlocks);
  write_eigenvalues<D::kThreads>(shared.rows, n, rank * share, share, top, out, shared.reached);
#endif
}

}  // namespace

cudaError_t cluster_eigenvalues(const MatrixSpectrumParams& params, const float* gram, cudaStream_t stream,
                                bool* done) {
  const void* kernel = reinterpret_cast<const void*>(cluster_eigen_kernel);
  if (const cudaError_t err = cluster_fits(kernel, kBlocks, D::kThreads, 0, done); err != cudaSuccess || !*done) {
    return err;
  }
  const dim3 grid(static_cast<unsigned>(params.batch) * params.heads * kBlocks);
  return launch_kernel({grid, D::kThreads, 0, stream, kBlocks}, cluster_eigen_kernel, gram, params.spectrum,
                       static_cast<int>(params.dim), static_cast<int>(params.top));
}

}  // namespace uncomp::kernels
