// SPDX-License-Identifier: Apache-2.0
// matrix_spectrum: checks, the C++ entry and the CPU body, which computes in float64 throughout.
#include "ops/matrix_spectrum.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "core/householder.h"
#include "core/ragged.h"
#include "core/sturm.h"
#include "ops/call.h"
#include "ops/check.h"
#include "ops/threads.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "matrix_spectrum";
/// Tokens that are normalised at a time; bounds the scratch memory.
constexpr int64_t kChunk = 2048;
/// Tokens that one task normalises.
constexpr int64_t kTaskRows = 64;
/// Above this many channels LAPACK's cubic part pays.
constexpr int64_t kOwnSolverDim = 256;

}  // namespace

at::Tensor matrix_spectrum(const at::Tensor& states, const std::optional<at::Tensor>& first,
                           const std::optional<at::Tensor>& length, int64_t top) {
  static const auto op = op_handle<at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&,
                                              const std::optional<at::Tensor>&, int64_t)>("uncomp::matrix_spectrum");
  return op.call(states, first, length, top);
}

void check_matrix_spectrum(const at::Tensor& states, const std::optional<at::Tensor>& first,
                           const std::optional<at::Tensor>& length, int64_t top) {
  check_rank(kOp, "states", states, 4, "[B, H, S, D]");
  if (states.is_cpu()) {
    const at::ScalarType dtype = states.scalar_type();
    UNCOMP_CHECK_TYPE(kOp, dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
                      "states must be float64, float32, float16 or bfloat16; got ", dtype_name(dtype));
  } else {
    check_float(kOp, "states", states);
  }
  const int64_t dim = states.size(3);
  UNCOMP_CHECK_VALUE(kOp, dim >= 2, "states must have at least 2 channels; got ", dim);
  UNCOMP_CHECK_LIMIT(kOp, states.is_cpu() || dim <= kMaxSpectrumDim, "states must have at most ", kMaxSpectrumDim,
                     " channels on CUDA (the CPU takes any); got ", dim);
  UNCOMP_CHECK_VALUE(kOp, top >= 1 && top <= dim, "top must lie in [1, ", dim, "]; got ", top);
  check_last_contiguous(kOp, "states", states);
  check_int32(kOp, "first", first, {states.size(0)}, "[B]", "states", states);
  check_int32(kOp, "length", length, {states.size(0)}, "[B]", "states", states);
  check_int32_size(kOp, "tokens", states.size(2));
  check_int32_size(kOp, "channels", dim);
  check_int32_size(kOp, "heads of all sequences", states.size(0) * states.size(1));
}

namespace {

/// Mean token of `count` tokens: partial sums of kChunk tokens, added in order.
template <class T>
std::vector<double> mean_token(const T* rows, int64_t token_stride, int64_t count, int64_t dim) {
  const int64_t chunks = ceil_div(count, kChunk);
  std::vector<double> sums(chunks * dim, 0.0), mean(dim, 0.0);
  share(chunks, threads_for(count * dim), [&](int64_t c, int64_t) {
    for (int64_t i = c * kChunk; i < std::min((c + 1) * kChunk, count); ++i) {
      for (int64_t j = 0; j < dim; ++j) sums[c * dim + j] += static_cast<double>(rows[i * token_stride + j]);
    }
  });
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t j = 0; j < dim; ++j) mean[j] += sums[c * dim + j] / static_cast<double>(count);
  }
  return mean;
}

/// One token, centred and scaled to length 1; zeros where it equals the mean up to rounding. The largest entry is
/// divided out first, so that no square leaves the range.
template <class T>
void unit_row(const T* row, const double* mean, int64_t dim, double* out) {
  double largest = 0.0;
  for (int64_t j = 0; j < dim; ++j) {
    out[j] = static_cast<double>(row[j]) - mean[j];
    const double size = std::abs(out[j]);
    if (size > largest || std::isnan(size)) largest = size;
  }
  double square = 0.0, plain_square = 0.0;
  for (int64_t j = 0; j < dim; ++j) {
    out[j] = largest == 0.0 ? 0.0 : out[j] / largest;
    const double plain = largest == 0.0 ? 0.0 : static_cast<double>(row[j]) / largest;
    square += out[j] * out[j];
    plain_square += plain * plain;
  }
  const bool is_mean = square <= 1e-10 * plain_square;
  const double length = std::sqrt(square);
  for (int64_t j = 0; j < dim; ++j) out[j] = is_mean ? 0.0 : out[j] / length;
}

/// Z^T Z of one head, added into `gram` [D, D].
template <class T>
void add_gram(const T* rows, int64_t token_stride, int64_t count, const at::Tensor& gram) {
  const int64_t dim = gram.size(0);
  if (count == 0) return;
  const std::vector<double> mean = mean_token(rows, token_stride, count, dim);
  const at::Tensor unit = at::empty({std::min(count, kChunk), dim}, gram.options());
  double* z = unit.mutable_data_ptr<double>();
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t tokens = std::min(kChunk, count - begin);
    share(ceil_div(tokens, kTaskRows), threads_for(tokens * dim), [&](int64_t task, int64_t) {
      for (int64_t i = task * kTaskRows; i < std::min((task + 1) * kTaskRows, tokens); ++i) {
        unit_row(rows + (begin + i) * token_stride, mean.data(), dim, z + i * dim);
      }
    });
    const at::Tensor live = unit.narrow(0, 0, tokens);
    gram.addmm_(live.t(), live);
  }
}

/// Eigenvalues of gram / trace into out [top]; gram [D, D] is overwritten.
void spectrum_of(const at::Tensor& gram, int64_t top, double* out) {
  const int dim = static_cast<int>(gram.size(0));
  double* a = gram.mutable_data_ptr<double>();
  double trace = 0.0;
  for (int i = 0; i < dim; ++i) trace += a[static_cast<int64_t>(i) * dim + i];
  if (!std::isfinite(trace) || trace <= 0.0) {
    std::fill_n(out, top, trace == 0.0 ? 0.0 : std::numeric_limits<double>::quiet_NaN());
    return;
  }
  for (int64_t i = 0; i < static_cast<int64_t>(dim) * dim; ++i) a[i] /= trace;
  if (dim > kOwnSolverDim) {
    const at::Tensor ascending = at::linalg_eigvalsh(gram);
    const double* values = ascending.const_data_ptr<double>();
    for (int64_t r = 0; r < top; ++r) out[r] = std::max(0.0, values[dim - 1 - r]);
    return;
  }
  std::vector<double> diagonal(dim), coupling(dim), scratch(2 * dim);
  tridiagonalize(a, dim, diagonal.data(), coupling.data(), scratch.data());
  std::vector<TridiagonalRow<double>> rows(dim);
  for (int i = 0; i < dim; ++i) rows[i] = tridiagonal_row(diagonal[i], coupling[i]);
  top_eigenvalues(rows.data(), dim, static_cast<int>(top), out);
}

at::Tensor matrix_spectrum_cpu(const at::Tensor& states, const std::optional<at::Tensor>& first,
                               const std::optional<at::Tensor>& length, int64_t top) {
  check_matrix_spectrum(states, first, length, top);
  const int64_t batch = states.size(0), heads = states.size(1), dim = states.size(3);
  const ValidTokens tokens{data_or_null<int32_t>(first), data_or_null<int32_t>(length),
                           static_cast<int32_t>(states.size(2))};
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = tokens.first == nullptr ? 0 : tokens.first[b];
    const int64_t count = tokens.length == nullptr ? tokens.seq_len - begin : tokens.length[b];
    UNCOMP_CHECK_VALUE(kOp, begin >= 0 && count >= 0 && begin + count <= tokens.seq_len,
                       "first and length must mark columns of the ", tokens.seq_len, " tokens; got first ", begin,
                       " and length ", count, " in sequence ", b);
  }
  const at::Tensor gram = at::zeros({batch * heads, dim, dim}, states.options().dtype(at::kDouble));
  const at::Tensor spectrum = at::empty({batch, heads, top}, gram.options());
  double* out = spectrum.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, states.scalar_type(), kOp, [&] {
    const scalar_t* data = states.const_data_ptr<scalar_t>();
    // One head is shared inside, several among each other: within a task all is serial.
    share(batch * heads, threads_for(states.numel() + gram.numel()), [&](int64_t m, int64_t) {
      const at::AutoDispatchBelowADInplaceOrView plain_tensors;  // a thread may lack the caller's inference mode
      const int32_t b = static_cast<int32_t>(m / heads);
      const scalar_t* rows =
          data + b * states.stride(0) + m % heads * states.stride(1) + tokens.begin(b) * states.stride(2);
      const at::Tensor of_head = gram[m];
      add_gram(rows, states.stride(2), tokens.count(b), of_head);
      spectrum_of(of_head, top, out + m * top);
    });
  });
  return states.scalar_type() == at::kDouble ? spectrum : spectrum.to(at::kFloat);
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("matrix_spectrum", &matrix_spectrum_cpu); }

}  // namespace
}  // namespace uncomp
