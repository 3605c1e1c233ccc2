// SPDX-License-Identifier: Apache-2.0
// Kernel floor of matrix_entropy: one number and its exponential per spectrum.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/entropy.h"

namespace uncomp::kernels {

struct MatrixEntropyParams {
  const void* spectrum;  // [M, N] float32 or, `wide`, float64
  void* entropy;         // [M]    shares of ln D, type of spectrum
  void* erank;           // [M]    type of spectrum
  int64_t rows;          // M
  int32_t width;         // N
  int32_t used;          // eigenvalues that enter, at most N
  int32_t dim;           // D
  EntropyKind kind;
  bool wide;
};

cudaError_t matrix_entropy(const MatrixEntropyParams& params, cudaStream_t stream);

}  // namespace uncomp::kernels
