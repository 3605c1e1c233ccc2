// SPDX-License-Identifier: Apache-2.0
// Counting must agree with spectra known in closed form, also where a probe hits an eigenvalue or a pivot is zero.
#include "core/sturm.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "support/catch.hpp"

using namespace uncomp;

namespace {

constexpr double kPi = 3.14159265358979323846;

/// diagonal a, couplings b: eigenvalues a + 2 b cos(pi r / (n + 1)).
template <class T>
std::vector<TridiagonalRow<T>> toeplitz(int n, double a, double b) {
  return std::vector<TridiagonalRow<T>>(n, tridiagonal_row(static_cast<T>(a), static_cast<T>(b)));
}

template <class T>
void check_toeplitz(double tolerance) {
  for (const int n : {1, 2, 3, 32, 64, 80, 96, 128, 256}) {
    const double a = 0.5, b = 0.2;
    const auto rows = toeplitz<T>(n, a, b);
    std::vector<T> got(n);
    top_eigenvalues(rows.data(), n, n, got.data());
    for (int r = 0; r < n; ++r) {
      const double want = a + 2 * b * std::cos(kPi * (r + 1) / (n + 1));
      REQUIRE(std::abs(got[r] - want) < tolerance);
      REQUIRE(sturm_count(rows.data(), n, static_cast<T>(want + 1e-4 / n)) >= n - r);
      REQUIRE(sturm_count(rows.data(), n, static_cast<T>(want - 1e-4 / n)) <= n - 1 - r);
    }
  }
}

}  // namespace

TEST_CASE("the second-difference matrix in float and double", "[sturm]") {
  check_toeplitz<float>(3e-7);
  check_toeplitz<double>(1e-14);
}

TEST_CASE("a pivot of exactly zero does not lose the count", "[sturm]") {
  // Eigenvalues 0.5 +- 0.25: at x = 0.5 the first pivot is zero.
  const auto coupled = toeplitz<float>(2, 0.5, 0.25);
  REQUIRE(sturm_count(coupled.data(), 2, 0.5f) == 1);
  // Decoupled entries hit exactly: the two that equal x may fall on either side, the others may not.
  std::vector<TridiagonalRow<float>> rows;
  for (const float x : {0.5f, 0.25f, 0.5f, 0.75f}) rows.push_back(tridiagonal_row(x, 0.0f));
  const int at = sturm_count(rows.data(), 4, 0.5f);
  REQUIRE((at >= 1 && at <= 3));
  REQUIRE(sturm_count(rows.data(), 4, 0.51f) == 3);
  REQUIRE(sturm_count(rows.data(), 4, 0.49f) == 1);
}

TEST_CASE("zero matrices and zero tails give zeros up to the coupling floor", "[sturm]") {
  std::vector<TridiagonalRow<float>> rows(5, tridiagonal_row(0.0f, 0.0f));
  std::vector<float> got(5, -1.0f);
  top_eigenvalues(rows.data(), 5, 5, got.data());
  for (const float x : got) REQUIRE(x <= 1e-9f);
  rows[2] = tridiagonal_row(1.0f, 0.0f);
  top_eigenvalues(rows.data(), 5, 5, got.data());
  REQUIRE(std::abs(got[0] - 1.0f) < 1e-6f);
  for (int r = 1; r < 5; ++r) REQUIRE(got[r] < 1e-7f);
}

TEST_CASE("negative rounding is clamped to zero", "[sturm]") {
  std::vector<TridiagonalRow<double>> rows{tridiagonal_row(-1e-9, 0.0), tridiagonal_row(1.0, 0.0)};
  double got[2];
  top_eigenvalues(rows.data(), 2, 2, got);
  REQUIRE(got[0] == Approx(1.0));
  REQUIRE(got[1] == 0.0);
}

TEST_CASE("small couplings and entries keep their digits", "[sturm]") {
  for (const double scale : {1e-6, 1e-3, 1.0}) {
    const auto rows = toeplitz<double>(40, 0.5 * scale, 0.2 * scale);
    std::vector<double> got(40);
    top_eigenvalues(rows.data(), 40, 40, got.data());
    for (int r = 0; r < 40; ++r) {
      REQUIRE(std::abs(got[r] / scale - (0.5 + 0.4 * std::cos(kPi * (r + 1) / 41))) < 1e-13);
    }
  }
}

namespace {

/// By SturmMinors, padded and counted 16 rows at a time.
int count_by_minors(std::vector<TridiagonalRow<float>> rows, float x) {
  rows.resize(round_up<size_t>(rows.size(), 16), kSturmPadding);
  SturmMinors minors;
  int below = 0;
  for (size_t base = 0; base < rows.size(); base += 16) {
    for (size_t i = base; i < base + 16; i += SturmMinors::kStride) {
      const float scale = minors.scale();
      for (size_t j = i; j < i + SturmMinors::kStride; ++j) {
        if (j == i + 2) minors.rescale(scale);
        minors.step(rows[j], x);
      }
    }
    below += minors.negative_pivots(16);
  }
  return below;
}

}  // namespace

TEST_CASE("minors count like pivots, up to the rounding of the entries", "[sturm]") {
  std::mt19937 random(3u);
  std::uniform_real_distribution<float> uniform;
  for (const int n : {1, 2, 15, 16, 17, 64, 127, 128, 256}) {
    for (const float fade : {1.0f, 0.8f, 0.3f, 1e-6f}) {
      std::vector<TridiagonalRow<float>> rows;
      std::vector<TridiagonalRow<double>> exact;
      float size = 1.0f;
      for (int i = 0; i < n; ++i, size = std::max(size * fade, 1e-9f)) {
        rows.push_back(tridiagonal_row(uniform(random) * size, 0.5f * uniform(random) * size));
        exact.push_back({rows[i].diagonal, rows[i].coupling_square});
      }
      for (int q = 0; q < 50; ++q) {
        const float x = q % 2 == 0 ? uniform(random) : std::pow(10.0f, -10.0f * uniform(random));
        const int got = count_by_minors(rows, x);
        REQUIRE(got >= sturm_count(exact.data(), n, x - 4e-7));
        REQUIRE(got <= sturm_count(exact.data(), n, x + 4e-7));
      }
    }
  }
}

TEST_CASE("minors survive rows that vanish together, and many of them", "[sturm]") {
  // 128 equal entries without couplings: at x beside them every minor is as small as it gets.
  std::vector<TridiagonalRow<float>> rows(128, tridiagonal_row(1.0f / 128.0f, 0.0f));
  rows.push_back(tridiagonal_row(0.9f, 0.0f));
  REQUIRE(count_by_minors(rows, 1.0f / 128.0f + 1e-8f) == 128);
  REQUIRE(count_by_minors(rows, 1.0f / 128.0f - 1e-8f) == 0);
  const int at = count_by_minors(rows, 1.0f / 128.0f);
  REQUIRE((at >= 0 && at <= 128));
  REQUIRE(count_by_minors(rows, 0.95f) == 129);
  // Zeros: only the last row is above.
  std::vector<TridiagonalRow<float>> zeros(200, tridiagonal_row(0.0f, 0.0f));
  zeros.push_back(tridiagonal_row(0.9f, 0.0f));
  for (const float x : {1e-9f, 1e-8f, 1e-6f, 0.5f}) REQUIRE(count_by_minors(zeros, x) == 200);
  REQUIRE(count_by_minors(zeros, 1.0f) == 201);
}

TEST_CASE("rescaled minors lie where the next rows cannot lose them", "[sturm]") {
  for (const float x : {1e-38f, 1e-30f, 1e-10f, 1.0f, 1e10f, 1e38f}) {
    for (const float ratio : {0.0f, 1e-20f, 1.0f}) {
      SturmMinors minors;
      minors.last = -x;
      minors.before = x * ratio;
      minors.rescale(minors.scale());
      REQUIRE(minors.last < 0.0f);
      REQUIRE(std::abs(minors.last) < 2.6e30f);
      REQUIRE(std::abs(minors.last) >= (x < 1e-8f ? 1.0f : 1.2e30f));
      if (x * ratio > 1e-37f) REQUIRE(minors.before / minors.last == Approx(-ratio));
    }
  }
  REQUIRE(kSturmPadding.diagonal > 4.0f);
}

TEST_CASE("a bracket narrows to the interval between its probes", "[sturm]") {
  for (int reached = 0; reached <= 8; ++reached) {
    Bracket<double> bracket{1.0, 10.0};
    bracket.narrow(reached, 8);
    REQUIRE(bracket.low == Approx(1.0 + reached));
    REQUIRE(bracket.high == Approx(2.0 + reached));
  }
  REQUIRE(Bracket<double>{0.0, 1e-8}.value() == 0.0);
  REQUIRE(Bracket<double>{1.0, 2.0}.value() == 1.5);
}
