// SPDX-License-Identifier: Apache-2.0
// The order of the launches. Heads of few tokens need one launch before their eigenvalues. On sm_90a, longer
// half-precision heads of up to 128 channels are summed all at once and then multiplied all at once; elsewhere every
// group of heads is summed and multiplied while it lies in L2. Then all eigenvalues follow at once.
#include "kernels/matrix_spectrum.h"

#include <algorithm>

#include "kernels/matrix_spectrum/stages.h"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int64_t kAlignment = 64;  // float32 words, 256 bytes

struct Layout {
  SpectrumPlan plan;
  int64_t partial, gram, words;  // offsets in float32 words; the sums come first
};

cudaError_t make_layout(const MatrixSpectrumParams& params, Layout* layout) {
  DeviceInfo device{};
  if (const cudaError_t err = device_info(&device); err != cudaSuccess) return err;
  const int64_t matrices = int64_t{params.batch} * params.heads;
  layout->plan = spectrum_plan(matrices, params.tokens.seq_len, params.dim, dtype_bytes(params.dtype), device.sm_count,
                               device.l2_bytes);
  bool stream = false;
  if (const cudaError_t err = stream_gram_runs(params, layout->plan.tile, &stream); err != cudaSuccess) return err;
  if (stream) layout->plan = small_plan(layout->plan, params.tokens.seq_len);
  if (stream && layout->plan.tile_tokens == 0) {
    layout->plan = stream_plan(layout->plan, matrices, params.tokens.seq_len, device.sm_count);
  }
  layout->partial = round_up(layout->plan.sum_words(), kAlignment);
  layout->gram = layout->partial + round_up(layout->plan.partial_words(), kAlignment);
  layout->words = layout->gram + layout->plan.gram_words(matrices);
  return cudaSuccess;
}

}  // namespace

cudaError_t matrix_spectrum_workspace(const MatrixSpectrumParams& params, int64_t* bytes) {
  Layout layout{};
  const cudaError_t err = make_layout(params, &layout);
  *bytes = layout.words * static_cast<int64_t>(sizeof(float));
  return err;
}

cudaError_t matrix_spectrum(const MatrixSpectrumParams& params, void* workspace, cudaStream_t stream) {
  if (params.dim < 2 || params.dim > kMaxSpectrumDim || params.top < 1 || params.top > params.dim) {
    return cudaErrorInvalidValue;
  }
  Layout layout{};
  if (const cudaError_t err = make_layout(params, &layout); err != cudaSuccess) return err;
  const int32_t matrices = params.batch * params.heads;
  if (matrices == 0) return cudaSuccess;
  float* sums = static_cast<float*>(workspace);
  float4* partial = reinterpret_cast<float4*>(sums + layout.partial);
  float* gram = sums + layout.gram;
  if (layout.plan.tile_tokens > 0) {
    if (const cudaError_t err = small_gram(params, layout.plan, gram, stream); err != cudaSuccess) return err;
    return eigenvalues(params, layout.plan, gram, stream);
  }
  if (layout.plan.stream_blocks > 0) {
    if (const cudaError_t err = column_sums(params, layout.plan, {0, matrices}, sums, stream); err != cudaSuccess) {
      return err;
    }
    if (const cudaError_t err = stream_gram(params, layout.plan, sums, partial, gram, stream); err != cudaSuccess) {
      return err;
    }
    return eigenvalues(params, layout.plan, gram, stream);
  }
  for (int32_t first = 0; first < matrices; first += layout.plan.group) {
    const HeadGroup group{first, std::min(layout.plan.group, matrices - first)};
    if (const cudaError_t err = column_sums(params, layout.plan, group, sums, stream); err != cudaSuccess) return err;
    if (const cudaError_t err = gram_matrices(params, layout.plan, group, sums, partial, gram, stream);
        err != cudaSuccess) {
      return err;
    }
  }
  return eigenvalues(params, layout.plan, gram, stream);
}

}  // namespace uncomp::kernels
