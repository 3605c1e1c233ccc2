// SPDX-License-Identifier: Apache-2.0
// The launches of matrix_spectrum, one a stage. All read and write workspace in the plan's layout.
#pragma once

#include "core/gram.h"
#include "kernels/matrix_spectrum.h"

namespace uncomp::kernels {

/// A run of heads: matrices first .. first + count - 1 of B * H.
struct HeadGroup {
  int32_t first, count;
};

/// sums [count, sum_chunks, tile]: channel sums of every token range, float32.
cudaError_t column_sums(const MatrixSpectrumParams& params, const SpectrumPlan& plan, HeadGroup group, float* sums,
                        cudaStream_t stream);

/// partial [count, gram_chunks, ...] in fragment order; gram [B * H, tile, tile], both triangles: 256 * Z^T Z.
cudaError_t gram_matrices(const MatrixSpectrumParams& params, const SpectrumPlan& plan, HeadGroup group,
                          const float* sums, float4* partial, float* gram, cudaStream_t stream);

/// Whether the next one runs on the current device and for these states: sm_90a, half precision, whole vectors, at most
/// 128 channels.
cudaError_t stream_gram_runs(const MatrixSpectrumParams& params, int32_t tile, bool* runs);

/// Gram matrices of all heads at once, where plan.stream_blocks > 0.
cudaError_t stream_gram(const MatrixSpectrumParams& params, const SpectrumPlan& plan, const float* sums,
                        float4* partial, float* gram, cudaStream_t stream);

/// Gram matrices of all heads at once, where plan.tile_tokens > 0; there is nothing to sum before.
cudaError_t small_gram(const MatrixSpectrumParams& params, const SpectrumPlan& plan, float* gram, cudaStream_t stream);

/// The `top` largest eigenvalues of gram / trace. Reads spectrum, batch, heads, dim and top of the parameters.
cudaError_t eigenvalues(const MatrixSpectrumParams& params, const SpectrumPlan& plan, const float* gram,
                        cudaStream_t stream);

/// The same for 129 to 256 channels by clusters of blocks; *done tells whether the device can hold them.
cudaError_t cluster_eigenvalues(const MatrixSpectrumParams& params, const float* gram, cudaStream_t stream, bool* done);

/// The same for 129 to 256 channels on every device: the matrix lies in shared memory.
cudaError_t packed_eigenvalues(const MatrixSpectrumParams& params, const float* gram, cudaStream_t stream);

}  // namespace uncomp::kernels
