// SPDX-License-Identifier: Apache-2.0
// A warp a spectrum, in float64 for both types: a few logarithms a head, and no rounding to argue about.
#include "kernels/matrix_entropy.h"

#include <algorithm>

#include "core/math.h"
#include "kernels/common/reduce.cuh"

namespace uncomp::kernels {
namespace {

constexpr int kWarps = 4;

__global__ void __launch_bounds__(32 * kWarps)
    matrix_entropy_kernel(const __grid_constant__ MatrixEntropyParams params) {
  const int lane = threadIdx.x % 32;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < params.rows; row += stride) {
    const int64_t begin = row * params.width;
    EntropySums<double> sums;
    for (int r = lane; r < params.used; r += 32) {
      sums.add(params.wide ? static_cast<const double*>(params.spectrum)[begin + r]
                           : static_cast<const float*>(params.spectrum)[begin + r]);
    }
    sums.share = warp_sum(sums.share);
    sums.log_sum = warp_sum(sums.log_sum);
    sums.square = warp_sum(sums.square);
    if (lane != 0) continue;
    const double nats = entropy_of(sums, params.kind);
    const double entropy = nats / log(static_cast<double>(params.dim)), erank = exp(nats);
    if (params.wide) {
      static_cast<double*>(params.entropy)[row] = entropy;
      static_cast<double*>(params.erank)[row] = erank;
    } else {
      static_cast<float*>(params.entropy)[row] = static_cast<float>(entropy);
      static_cast<float*>(params.erank)[row] = static_cast<float>(erank);
    }
  }
}

}  // namespace

cudaError_t matrix_entropy(const MatrixEntropyParams& params, cudaStream_t stream) {
  if (params.rows == 0) return cudaSuccess;
  const int64_t blocks = std::min<int64_t>(ceil_div<int64_t>(params.rows, kWarps), 65535);
  matrix_entropy_kernel<<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
