// SPDX-License-Identifier: Apache-2.0
// The launch itself: both types, all kinds, widths around a warp, and nothing written outside the buffers.
#include "kernels/matrix_entropy.h"

#include <cmath>

#include "support/catch.hpp"
#include "support/device.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

template <class T>
void check(int32_t rows, int32_t width, int32_t used, EntropyKind kind, double tolerance) {
  std::vector<T> spectrum(static_cast<size_t>(rows) * width);
  for (size_t i = 0; i < spectrum.size(); ++i) {
    spectrum[i] = static_cast<T>(i % 11) / static_cast<T>(11 * width);  // zeros among them
  }
  DeviceArray<T> shares(spectrum), entropy(rows), erank(rows);
  kernels::MatrixEntropyParams params{};
  params.spectrum = shares.data();
  params.entropy = entropy.data();
  params.erank = erank.data();
  params.rows = rows;
  params.width = width;
  params.used = used;
  params.dim = width + 1;
  params.kind = kind;
  params.wide = sizeof(T) == 8;
  cuda_ok(kernels::matrix_entropy(params, nullptr));
  const std::vector<T> got = entropy.host(), got_rank = erank.host();
  for (int32_t row = 0; row < rows; ++row) {
    EntropySums<double> sums;
    for (int32_t r = 0; r < used; ++r) sums.add(spectrum[static_cast<size_t>(row) * width + r]);
    const double nats = entropy_of(sums, kind);
    REQUIRE(std::abs(got[row] - nats / std::log(width + 1.0)) < tolerance);
    REQUIRE(std::abs(got_rank[row] / std::exp(nats) - 1.0) < tolerance);
  }
  REQUIRE(entropy.guards_intact());
  REQUIRE(erank.guards_intact());
}

}  // namespace

TEST_CASE("kinds, types and widths", "[matrix_entropy]") {
  for (const auto kind : {EntropyKind::truncated, EntropyKind::renormalized, EntropyKind::renyi2}) {
    for (const int32_t width : {2, 31, 32, 33, 300}) {
      check<float>(7, width, width, kind, 1e-6);
      check<double>(5, width, width, kind, 1e-13);
      check<float>(1000, width, 2, kind, 1e-6);
    }
  }
}
