// SPDX-License-Identifier: Apache-2.0
// The launches themselves: all tiles and types, aligned and not, ragged lengths, NaN outside the real tokens,
// degenerate heads, and nothing written outside the buffers.
#include "kernels/matrix_spectrum.h"

#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "core/householder.h"
#include "core/sturm.h"
#include "support/catch.hpp"
#include "support/device.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Problem {
  int batch, heads, seq_len, dim, width;  // width: elements from token to token
  bool half;                              // bfloat16 instead of float32
  std::vector<int32_t> first, length;
  std::vector<float> values;           // [B, H, S, width]
  std::vector<uint16_t> short_values;  // the same numbers as bfloat16, where `half`

  float* token(int b, int h, int s) { return values.data() + ((int64_t{b} * heads + h) * seq_len + s) * width; }
};

/// Random tokens with unequal channel sizes and a common offset; what is not real is NaN.
Problem make_problem(int batch, int heads, int seq_len, int dim, int width, bool half) {
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
  if (half) {
    for (const float x : p.values) p.short_values.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16));
    for (size_t i = 0; i < p.values.size(); ++i) {
      p.values[i] = std::bit_cast<float>(static_cast<uint32_t>(p.short_values[i]) << 16);
    }
  }
  return p;
}

/// By the definition, in double.
std::vector<double> oracle(Problem& p, int b, int h) {
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

std::vector<float> launch(const Problem& p, int top, bool vectors) {
  DeviceArray<uint16_t> half_states(p.short_values);
  DeviceArray<float> states(p.half ? std::vector<float>{} : p.values);
  DeviceArray<int32_t> first(p.first), length(p.length);
  DeviceArray<float> spectrum(static_cast<size_t>(p.batch) * p.heads * top);
  kernels::MatrixSpectrumParams params{};
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
  DeviceArray<char> workspace(static_cast<size_t>(bytes));
  cuda_ok(cudaMemset(workspace.data(), 0xff, static_cast<size_t>(bytes)));  // NaN wherever nothing is written
  cuda_ok(kernels::matrix_spectrum(params, workspace.data(), nullptr));
  const std::vector<float> got = spectrum.host();
  REQUIRE(spectrum.guards_intact());
  REQUIRE(workspace.guards_intact());
  cuda_ok(kernels::matrix_spectrum(params, workspace.data(), nullptr));
  REQUIRE(std::memcmp(spectrum.host().data(), got.data(), got.size() * sizeof(float)) == 0);
  return got;
}

void compare(Problem& p, int top, bool vectors) {
  const std::vector<float> got = launch(p, top, vectors);
  // Beyond 1024 tokens half-precision states are multiplied as one half-precision part.
  const double bound = !p.half ? 2e-6 : p.seq_len <= 1024 ? 2e-5 : 1e-4;
  for (int m = 0; m < p.batch * p.heads; ++m) {
    const std::vector<double> want = oracle(p, m / p.heads, m % p.heads);
    for (int r = 0; r < top; ++r) {
      const double off = std::abs(got[m * top + r] - want[r]);
      if (!(off < bound)) {
        FAIL("D " << p.dim << " S " << p.seq_len << " half " << p.half << " vectors " << vectors << " head " << m
                  << " eigenvalue " << r << ": got " << got[m * top + r] << ", want " << want[r]);
      }
    }
  }
}

/// Equal tokens, one token, no token and NaN, beside heads like any other.
void check_degenerate(int dim) {
  Problem p = make_problem(4, 2, 50, dim, dim, false);
  for (int s = 0; s < 50; ++s) {
    for (int j = 0; j < dim; ++j) p.token(0, 1, s)[j] = 0.1f * static_cast<float>(j + 1);
  }
  p.length[1] = 1;
  p.length[2] = 0;
  p.token(3, 1, 7)[dim - 1] = kNan;
  const std::vector<float> got = launch(p, dim, true);
  const auto value = [&](int b, int h, int r) { return got[(b * 2 + h) * dim + r]; };
  REQUIRE(value(0, 0, 0) > 0.0f);
  for (int r = 0; r < dim; ++r) {
    REQUIRE(value(0, 1, r) == 0.0f);
    REQUIRE(value(1, 0, r) == 0.0f);
    REQUIRE(value(2, 1, r) == 0.0f);
    REQUIRE(value(3, 0, r) == value(3, 0, r));
    REQUIRE(value(3, 1, r) != value(3, 1, r));
  }
}

}  // namespace

TEST_CASE("every tile and type, whole vectors", "[matrix_spectrum]") {
  for (const int dim : {8, 64, 72, 128, 136, 256}) {
    for (const bool half : {false, true}) {
      if (dim == 256 && !half) continue;  // 136 meets the same kernels
      Problem p = make_problem(dim == 256 ? 1 : 2, 1, 65, dim, dim + 8, half);
      compare(p, half ? dim : (dim + 3) / 4, true);
    }
  }
  Problem chunks = make_problem(2, 1, 700, 128, 136, true);
  compare(chunks, 8, true);
}

TEST_CASE("every tile and type, several heads and lengths", "[matrix_spectrum][large]") {
  for (const int dim : {8, 64, 72, 128, 136, 256}) {
    for (const int seq_len : {3, 64, 65, 700}) {
      for (const bool half : {false, true}) {
        Problem p = make_problem(2, 3, seq_len, dim, dim + 8, half);
        compare(p, dim, true);
        compare(p, (dim + 3) / 4, true);
      }
    }
  }
}

TEST_CASE("odd widths are read one channel at a time", "[matrix_spectrum]") {
  for (const int dim : {3, 127, 129}) {
    for (const bool half : {false, true}) {
      Problem p = make_problem(1, 1, 200, dim, dim + 1, half);
      compare(p, dim, false);
    }
  }
}

TEST_CASE("odd widths of several heads", "[matrix_spectrum][large]") {
  for (const int dim : {2, 3, 33, 127, 129, 255}) {
    for (const bool half : {false, true}) {
      Problem p = make_problem(2, 2, 200, dim, dim + 1, half);
      compare(p, dim, false);
    }
  }
}

TEST_CASE("one head over chunks, and heads over one", "[matrix_spectrum]") {
  Problem one = make_problem(1, 1, 2000, 32, 32, true);
  compare(one, 8, true);
  Problem several = make_problem(3, 5, 40, 16, 16, true);
  compare(several, 4, true);
}

TEST_CASE("one head over many chunks, and many heads over few", "[matrix_spectrum][large]") {
  Problem one = make_problem(1, 1, 20000, 32, 32, true);
  compare(one, 8, true);
  Problem many = make_problem(3, 200, 40, 16, 16, true);
  compare(many, 4, true);
}

TEST_CASE("equal tokens, one token, no token and NaN", "[matrix_spectrum]") {
  for (const int dim : {64, 128, 136}) check_degenerate(dim);
}

TEST_CASE("equal tokens, one token, no token and NaN at full width", "[matrix_spectrum][large]") {
  check_degenerate(256);
}
