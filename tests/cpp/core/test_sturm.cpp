// SPDX-License-Identifier: Apache-2.0
// Counting must agree with spectra known in closed form, also where a probe hits an eigenvalue or a pivot is zero.
#include "core/sturm.h"

#include <cmath>
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
