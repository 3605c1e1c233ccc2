// SPDX-License-Identifier: Apache-2.0
// Kernel floor of matrix_spectrum: column sums, Gram matrices, eigenvalues.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/constants.h"
#include "core/dtype.h"
#include "core/ragged.h"

namespace uncomp::kernels {

struct MatrixSpectrumParams {
  const void* states;  // [B, H, S, D]
  Strides3 strides;    // elements
  ValidTokens tokens;  // first [B], length [B], S
  float* spectrum;     // [B, H, top], shares of the trace, descending
  int32_t batch, heads, dim, top;
  bool vectors;  // every token starts on a 16-byte border and D is a multiple of 8
  DType dtype;
};

/// Bytes of workspace for a call on the current device.
cudaError_t matrix_spectrum_workspace(const MatrixSpectrumParams& params, int64_t* bytes);

/// `workspace` is 256-byte aligned and may hold anything.
cudaError_t matrix_spectrum(const MatrixSpectrumParams& params, void* workspace, cudaStream_t stream);

}  // namespace uncomp::kernels
