// SPDX-License-Identifier: Apache-2.0
// matrix_entropy: checks, the C++ entry and the CPU body.
#include "ops/matrix_entropy.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "ops/call.h"
#include "ops/check.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "matrix_entropy";

}  // namespace

std::tuple<at::Tensor, at::Tensor> matrix_entropy(const at::Tensor& spectrum, int64_t top, int64_t dim,
                                                  std::string_view kind) {
  static const auto op =
      op_handle<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, int64_t, int64_t, std::string_view)>(
          "uncomp::matrix_entropy");
  return op.call(spectrum, top, dim, kind);
}

EntropyKind check_matrix_entropy(const at::Tensor& spectrum, int64_t top, int64_t dim, std::string_view kind) {
  UNCOMP_CHECK_TYPE(kOp, spectrum.scalar_type() == at::kFloat || spectrum.scalar_type() == at::kDouble,
                    "spectrum must be float32 or float64; got ", dtype_name(spectrum.scalar_type()));
  UNCOMP_CHECK_VALUE(kOp, spectrum.dim() >= 1, "spectrum must have shape [..., N]; got a scalar");
  check_contiguous(kOp, "spectrum", spectrum);
  const int64_t count = spectrum.size(-1);
  UNCOMP_CHECK_VALUE(kOp, dim >= 2, "dim must be at least 2; got ", dim);
  UNCOMP_CHECK_VALUE(kOp, count <= dim, "spectrum must have at most dim = ", dim, " eigenvalues; got ", count);
  UNCOMP_CHECK_VALUE(kOp, top >= 1 && top <= count, "top must lie in [1, ", count, "]; got ", top);
  check_int32_size(kOp, "dim", dim);
  if (kind == "truncated") return EntropyKind::truncated;
  if (kind == "renormalized") return EntropyKind::renormalized;
  UNCOMP_CHECK_VALUE(kOp, kind == "renyi2", "kind must be \"truncated\", \"renormalized\" or \"renyi2\"; got \"",
                     std::string(kind), "\"");
  UNCOMP_CHECK_VALUE(kOp, count == dim, "kind \"renyi2\" needs all ", dim, " eigenvalues; got ", count);
  return EntropyKind::renyi2;
}

namespace {

std::tuple<at::Tensor, at::Tensor> matrix_entropy_cpu(const at::Tensor& spectrum, int64_t top, int64_t dim,
                                                      std::string_view kind_name) {
  const EntropyKind kind = check_matrix_entropy(spectrum, top, dim, kind_name);
  const int64_t count = spectrum.size(-1), used = kind == EntropyKind::renyi2 ? count : top;
  const at::IntArrayRef shape = spectrum.sizes().slice(0, spectrum.dim() - 1);
  at::Tensor entropy = at::empty(shape, spectrum.options()), erank = at::empty(shape, spectrum.options());
  AT_DISPATCH_FLOATING_TYPES(spectrum.scalar_type(), kOp, [&] {
    const scalar_t* shares = spectrum.const_data_ptr<scalar_t>();
    scalar_t* to_entropy = entropy.mutable_data_ptr<scalar_t>();
    scalar_t* to_erank = erank.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < entropy.numel(); ++i) {
      EntropySums<double> sums;
      for (int64_t r = 0; r < used; ++r) sums.add(static_cast<double>(shares[i * count + r]));
      const double nats = entropy_of(sums, kind);
      to_entropy[i] = static_cast<scalar_t>(nats / std::log(static_cast<double>(dim)));
      to_erank[i] = static_cast<scalar_t>(std::exp(nats));
    }
  });
  return {entropy, erank};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("matrix_entropy", &matrix_entropy_cpu); }

}  // namespace
}  // namespace uncomp
