// SPDX-License-Identifier: Apache-2.0
// matrix_entropy: CUDA body.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/matrix_entropy.h"
#include "ops/check.h"
#include "ops/matrix_entropy.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

std::tuple<at::Tensor, at::Tensor> matrix_entropy_cuda(const at::Tensor& spectrum, int64_t top, int64_t dim,
                                                       std::string_view kind_name) {
  const EntropyKind kind = check_matrix_entropy(spectrum, top, dim, kind_name);
  const CudaScope scope(spectrum);
  const at::IntArrayRef shape = spectrum.sizes().slice(0, spectrum.dim() - 1);
  at::Tensor entropy = at::empty(shape, spectrum.options()), erank = at::empty(shape, spectrum.options());
  kernels::MatrixEntropyParams params{};
  params.spectrum = spectrum.const_data_ptr();
  params.entropy = entropy.mutable_data_ptr();
  params.erank = erank.mutable_data_ptr();
  params.rows = entropy.numel();
  params.width = static_cast<int32_t>(spectrum.size(-1));
  params.used = kind == EntropyKind::renyi2 ? params.width : static_cast<int32_t>(top);
  params.dim = static_cast<int32_t>(dim);
  params.kind = kind;
  params.wide = spectrum.scalar_type() == at::kDouble;
  check_launch("matrix_entropy", kernels::matrix_entropy(params, scope.stream()));
  return {entropy, erank};
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("matrix_entropy", &matrix_entropy_cuda); }

}  // namespace
}  // namespace uncomp
