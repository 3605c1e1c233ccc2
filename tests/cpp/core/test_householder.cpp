// SPDX-License-Identifier: Apache-2.0
// Tridiagonalisation must keep the spectrum: matrices with known eigenvalues, in float and in double.
#include "core/householder.h"

#include <algorithm>
#include <random>
#include <vector>

#include "core/sturm.h"
#include "support/catch.hpp"

using namespace uncomp;

namespace {

/// Q diag(values) Q^T with a random orthogonal Q: a product of n reflections.
std::vector<double> with_spectrum(const std::vector<double>& values, unsigned seed) {
  const int n = static_cast<int>(values.size());
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> a(static_cast<size_t>(n) * n, 0.0), v(n), w(n);
  for (int i = 0; i < n; ++i) a[i * n + i] = values[i];
  for (int round = 0; round < n; ++round) {
    double square = 0.0;
    for (double& x : v) {
      x = normal(random);
      square += x * x;
    }
    for (double& x : v) x /= std::sqrt(square);
    double along = 0.0;
    for (int i = 0; i < n; ++i) {
      w[i] = 0.0;
      for (int j = 0; j < n; ++j) w[i] += a[i * n + j] * v[j];
      along += v[i] * w[i];
    }
    for (int i = 0; i < n; ++i) w[i] = 2.0 * (w[i] - along * v[i]);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) a[i * n + j] -= v[i] * w[j] + w[i] * v[j];
    }
  }
  return a;
}

template <class T>
std::vector<T> eigenvalues(const std::vector<double>& matrix, int n, int top) {
  std::vector<T> a(matrix.begin(), matrix.end()), diagonal(n), coupling(n), scratch(2 * n), out(top);
  tridiagonalize(a.data(), n, diagonal.data(), coupling.data(), scratch.data());
  std::vector<TridiagonalRow<T>> rows(n);
  for (int i = 0; i < n; ++i) rows[i] = tridiagonal_row(diagonal[i], coupling[i]);
  top_eigenvalues(rows.data(), n, top, out.data());
  return out;
}

template <class T>
double distance(const std::vector<double>& values, int top, unsigned seed) {
  const int n = static_cast<int>(values.size());
  std::vector<double> want = values;
  std::sort(want.rbegin(), want.rend());
  const std::vector<T> got = eigenvalues<T>(with_spectrum(values, seed), n, top);
  double worst = 0.0;
  for (int r = 0; r < top; ++r) {
    if (r > 0) REQUIRE(got[r] <= got[r - 1]);
    worst = std::max(worst, std::abs(static_cast<double>(got[r]) - want[r]));
  }
  return worst;
}

/// Shares of a trace of 1.
std::vector<double> normalised(std::vector<double> values) {
  double sum = 0.0;
  for (const double x : values) sum += x;
  for (double& x : values) x /= sum;
  return values;
}

}  // namespace

TEST_CASE("a reflector clears the tail and keeps the length", "[householder]") {
  for (const double alpha : {0.0, 0.3, -0.3, 1e-12, 1.0}) {
    const std::vector<double> tail{0.1, -0.2, 0.05};
    double square = alpha * alpha;
    for (const double x : tail) square += x * x;
    const Reflector<double> r = make_reflector(alpha, square);
    double dot = r.head * alpha;  // v . column
    for (const double x : tail) dot += x * x;
    REQUIRE(alpha - r.tau * dot * r.head == Approx(r.beta));
    for (const double x : tail) REQUIRE(std::abs(x - r.tau * dot * x) < 1e-15);
    REQUIRE(r.beta * r.beta == Approx(square));
    REQUIRE(r.beta * alpha <= 0.0);
  }
}

TEST_CASE("a column without a tail only changes its sign", "[householder]") {
  const Reflector<float> r = make_reflector(0.5f, 0.25f);
  REQUIRE(r.beta == -0.5f);
  REQUIRE(r.head == 1.0f);
  REQUIRE(r.tau * r.head * r.head == Approx(2.0f));
}

TEST_CASE("a column of zeros, and one that is as good as zero, is left as it is", "[householder]") {
  for (const float alpha : {0.0f, 1e-13f}) {
    const Reflector<float> r = make_reflector(alpha, alpha * alpha);
    REQUIRE(r.tau == 0.0f);
    REQUIRE(r.beta == 0.0f);
    REQUIRE(r.head == alpha);
  }
}

TEST_CASE("spectra with shares of 1 come back: random, rank 1, equal, duplicated, geometric", "[householder]") {
  for (const int n : {2, 3, 5, 16, 32, 64, 80, 96, 128, 256}) {
    std::mt19937 random(static_cast<unsigned>(n));
    std::uniform_real_distribution<double> uniform;
    std::vector<double> rank_one(n, 0.0), equal(n, 1.0), pairs(n), geometric(n), free(n), half(n, 0.0);
    rank_one[0] = 1.0;
    for (int i = 0; i < n; ++i) {
      pairs[i] = 1.0 + i / 2;
      geometric[i] = std::pow(0.5, i);
      free[i] = uniform(random);
      if (i < ceil_div(n, 2)) half[i] = 1.0;
    }
    for (const auto& values : {rank_one, equal, pairs, geometric, free, half}) {
      const auto shares = normalised(values);
      REQUIRE(distance<double>(shares, n, 7u) < 1e-13);
      REQUIRE(distance<float>(shares, n, 8u) < 5e-7);
      REQUIRE(distance<float>(shares, ceil_div(n, 4), 9u) < 5e-7);
    }
  }
}

TEST_CASE("a diagonal matrix needs no reflector; its entries are the eigenvalues", "[householder]") {
  const int n = 6;
  std::vector<double> a(n * n, 0.0);
  for (int i = 0; i < n; ++i) a[i * n + i] = 0.1 * (i % 3);
  const auto got = eigenvalues<float>(a, n, n);
  const std::vector<double> want{0.2, 0.2, 0.1, 0.1, 0.0, 0.0};
  for (int r = 0; r < n; ++r) REQUIRE(std::abs(got[r] - want[r]) < 1e-7);
}

TEST_CASE("zero padding adds zero eigenvalues and nothing else", "[householder]") {
  const auto shares = normalised({0.5, 0.3, 0.2});
  const auto small = with_spectrum(shares, 3u);
  std::vector<double> padded(36, 0.0);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) padded[i * 6 + j] = small[i * 3 + j];
  }
  const auto got = eigenvalues<double>(padded, 6, 6);
  for (int r = 0; r < 6; ++r) REQUIRE(std::abs(got[r] - (r < 3 ? shares[r] : 0.0)) < 1e-14);
}

TEST_CASE("NaN in the matrix ends", "[householder]") {
  std::vector<double> a = with_spectrum(normalised({3.0, 2.0, 1.0, 1.0}), 5u);
  a[6] = a[9] = std::numeric_limits<double>::quiet_NaN();
  REQUIRE(eigenvalues<double>(a, 4, 4).size() == 4);
}
