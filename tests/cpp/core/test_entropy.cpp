// SPDX-License-Identifier: Apache-2.0
// Entropy of equal shares is known: r equal eigenvalues have rank r.
#include "core/entropy.h"

#include <limits>
#include <vector>

#include "support/catch.hpp"

using namespace uncomp;

namespace {

double nats(const std::vector<double>& shares, EntropyKind kind) {
  EntropySums<double> sums;
  for (const double s : shares) sums.add(s);
  return entropy_of(sums, kind);
}

}  // namespace

TEST_CASE("r equal shares have entropy ln r in every kind", "[entropy]") {
  for (const int r : {1, 2, 7, 128}) {
    const std::vector<double> shares(r, 1.0 / r);
    for (const auto kind : {EntropyKind::truncated, EntropyKind::renormalized, EntropyKind::renyi2}) {
      REQUIRE(std::abs(nats(shares, kind) - std::log(r)) < 1e-12);
    }
  }
}

TEST_CASE("a cut spectrum: renormalised shares differ, truncated ones do not", "[entropy]") {
  const std::vector<double> quarter(16, 1.0 / 64);
  REQUIRE(nats(quarter, EntropyKind::truncated) == Approx(0.25 * std::log(64.0)));
  REQUIRE(nats(quarter, EntropyKind::renormalized) == Approx(std::log(16.0)));
}

TEST_CASE("zeros, negative rounding and NaN", "[entropy]") {
  for (const auto kind : {EntropyKind::truncated, EntropyKind::renormalized, EntropyKind::renyi2}) {
    REQUIRE(nats({0.0, 0.0}, kind) == 0.0);
    REQUIRE(std::abs(nats({1.0, 0.0, -1e-9}, kind)) == 0.0);
    REQUIRE(std::isnan(nats({0.5, std::numeric_limits<double>::quiet_NaN()}, kind)));
  }
}
