// SPDX-License-Identifier: Apache-2.0
// matrix_spectrum: CUDA body.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/matrix_spectrum.h"
#include "kernels/runtime.h"
#include "ops/check.h"
#include "ops/matrix_spectrum.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

/// Every token starts on a 16-byte border and ends with a whole vector of 8 channels.
bool vectors_fit(const at::Tensor& states) {
  const int64_t bytes = states.element_size();
  bool fit = reinterpret_cast<uintptr_t>(states.const_data_ptr()) % 16 == 0 && states.size(3) % 8 == 0;
  for (int64_t d = 0; d < 3; ++d) fit = fit && (states.size(d) <= 1 || states.stride(d) * bytes % 16 == 0);
  return fit;
}

at::Tensor matrix_spectrum_cuda(const at::Tensor& states, const std::optional<at::Tensor>& first,
                                const std::optional<at::Tensor>& length, int64_t top) {
  check_matrix_spectrum(states, first, length, top);
  const CudaScope scope(states);
  kernels::DeviceInfo device;
  check_launch("matrix_spectrum", kernels::device_info(&device));
  UNCOMP_CHECK_LIMIT("matrix_spectrum", states.size(3) <= 128 || device.smem_per_block >= 140 * 1024,
                     "states with more than 128 channels need 140 KiB of shared memory a block, which this GPU lacks; "
                     "got ",
                     states.size(3), " channels");
  at::Tensor spectrum = at::empty({states.size(0), states.size(1), top}, states.options().dtype(at::kFloat));
  kernels::MatrixSpectrumParams params{};
  params.states = states.const_data_ptr();
  params.strides = {states.stride(0), states.stride(1), states.stride(2)};
  params.tokens = {data_or_null<int32_t>(first), data_or_null<int32_t>(length), static_cast<int32_t>(states.size(2))};
  params.spectrum = spectrum.mutable_data_ptr<float>();
  params.batch = static_cast<int32_t>(states.size(0));
  params.heads = static_cast<int32_t>(states.size(1));
  params.dim = static_cast<int32_t>(states.size(3));
  params.top = static_cast<int32_t>(top);
  params.vectors = vectors_fit(states);
  params.dtype = kernel_dtype(states);
  int64_t bytes = 0;
  check_launch("matrix_spectrum", kernels::matrix_spectrum_workspace(params, &bytes));
  const at::Tensor scratch = workspace(states, bytes);
  check_launch("matrix_spectrum", kernels::matrix_spectrum(params, scratch.mutable_data_ptr(), scope.stream()));
  return spectrum;
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("matrix_spectrum", &matrix_spectrum_cuda); }

}  // namespace
}  // namespace uncomp
