// SPDX-License-Identifier: Apache-2.0
// Problems for the tests of matrix_spectrum: random ragged heads, their spectrum by the definition, and one on the
// device.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include "core/householder.h"
#include "core/sturm.h"
#include "kernels/matrix_spectrum.h"
#include "support/device.hpp"
#include "support/repeat.hpp"

namespace uncomp::test::spectrum {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Problem {
  int batch, heads, seq_len, dim, width;  // width: elements from token to token
  bool half;                              // bfloat16 instead of float32
  std::vector<int32_t> first, length;
  std::vector<float> values;           // [B, H, S, width]
  std::vector<uint16_t> short_values;  // the same numbers as bfloat16, where `half`

  float* token(int b, int h, int s) { return values.data() + ((int64_t{b} * heads + h) * seq_len + s) * width; }
};

/// Where `half`, the values become bfloat16; again after each change of them.
inline void round_values(Problem& p) {
  if (!p.half) return;
  p.short_values.clear();
  for (float& x : p.values) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    p.short_values.push_back(static_cast<uint16_t>(bits >> 16));
    x = std::bit_cast<float>(bits & 0xffff0000u);
  }
}

/// Random tokens with unequal channel sizes and a common offset; what is not real is NaN.
inline Problem make_problem(int batch, int heads, int seq_len, int dim, int width, bool half) {
  Problem p{batch, heads, seq_len, dim, width, half, {}, {}, {}, {}};
  std::mt19937 random(static_cast<unsigned>(dim * 31 + seq_len));
  std::normal_distribution<float> normal;
  p.values.assign(static_cast<size_t>(batch) * heads * seq_len * width, kNan);
  for (int b = 0; b < batch; ++b) {
    p.first.push_back(b % 3 == 0 ? 0 : seq_len / 5);
    p.length.push_back(b % 3 == 0 ? seq_len : seq_len / 2);
    for (int h = 0; h < heads; ++h) {
      for (int s = p.first[b]; s < p.first[b] + p.length[b]; ++s) {
        for (int j = 0; j < dim; ++j) {
          p.token(b, h, s)[j] = normal(random) / static_cast<float>(1 + j % 7) + 0.5f;
        }
      }
    }
  }
  round_values(p);
  return p;
}

/// By the definition, in double.
inline std::vector<double> oracle(Problem& p, int b, int h) {
  const int n = p.length[b], dim = p.dim;
  std::vector<double> mean(dim, 0.0), gram(static_cast<size_t>(dim) * dim, 0.0), z(dim);
  for (int s = 0; s < n; ++s) {
    for (int j = 0; j < dim; ++j) mean[j] += static_cast<double>(p.token(b, h, p.first[b] + s)[j]) / n;
  }
  for (int s = 0; s < n; ++s) {
    double square = 0.0, plain = 0.0;
    for (int j = 0; j < dim; ++j) {
      const double x = p.token(b, h, p.first[b] + s)[j];
      z[j] = x - mean[j];
      square += z[j] * z[j];
      plain += x * x;
    }
    if (square <= 1e-10 * plain) continue;
    for (int i = 0; i < dim; ++i) {
      for (int j = 0; j < dim; ++j) gram[i * dim + j] += z[i] * z[j] / square;
    }
  }
  double trace = 0.0;
  for (int i = 0; i < dim; ++i) trace += gram[i * dim + i];
  std::vector<double> out(dim, trace == 0.0 ? 0.0 : std::nan("")), diagonal(dim), coupling(dim), scratch(2 * dim);
  if (!(trace > 0.0)) return out;
  for (double& x : gram) x /= trace;
  tridiagonalize(gram.data(), dim, diagonal.data(), coupling.data(), scratch.data());
  std::vector<TridiagonalRow<double>> rows(dim);
  for (int i = 0; i < dim; ++i) rows[i] = tridiagonal_row(diagonal[i], coupling[i]);
  top_eigenvalues(rows.data(), dim, dim, out.data());
  return out;
}

/// A problem on the device, with its own result and workspace.
struct Call {
  DeviceArray<uint16_t> half_states;
  DeviceArray<float> states;
  DeviceArray<int32_t> first, length;
  DeviceArray<float> spectrum;
  kernels::MatrixSpectrumParams params{};
  std::optional<DeviceArray<char>> workspace;

  Call(const Problem& p, int top, bool vectors)
      : half_states(p.short_values),
        states(p.half ? std::vector<float>{} : p.values),
        first(p.first),
        length(p.length),
        spectrum(static_cast<size_t>(p.batch) * p.heads * top) {
    params.states = p.half ? static_cast<const void*>(half_states.data()) : states.data();
    params.strides = {int64_t{p.heads} * p.seq_len * p.width, int64_t{p.seq_len} * p.width, p.width};
    params.tokens = {first.data(), length.data(), p.seq_len};
    params.spectrum = spectrum.data();
    params.batch = p.batch;
    params.heads = p.heads;
    params.dim = p.dim;
    params.top = top;
    params.vectors = vectors;
    params.dtype = p.half ? DType::bfloat16 : DType::float32;
    int64_t bytes = 0;
    cuda_ok(kernels::matrix_spectrum_workspace(params, &bytes));
    workspace.emplace(static_cast<size_t>(bytes));
  }
  /// NaN wherever nothing is written.
  void poison() {
    workspace->fill(0xff);
    spectrum.fill(0xff);
  }
  void launch(cudaStream_t stream) { cuda_ok(kernels::matrix_spectrum(params, workspace->data(), stream)); }
  Bytes results() const { return contents(spectrum); }
};

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace uncomp::test::spectrum
