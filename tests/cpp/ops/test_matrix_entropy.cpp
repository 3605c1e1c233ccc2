// SPDX-License-Identifier: Apache-2.0
// Entropy and effective rank of known spectra, on every device.
#include "ops/matrix_entropy.h"

#include <cmath>

#include "support/precompiled.hpp"
#include "support/torch.hpp"

TEST_CASE("r equal eigenvalues give ln r / ln D and rank r", "[matrix_entropy]") {
  for (const at::Device device : uncomp::test::devices()) {
    for (const auto dtype : {at::kFloat, at::kDouble}) {
      at::Tensor spectrum = at::zeros({8, 128}, dtype);
      for (int64_t i = 0; i < 8; ++i) spectrum[i].slice(0, 0, int64_t{1} << i).fill_(1.0 / (1 << i));
      const auto [entropy, erank] = uncomp::matrix_entropy(spectrum.to(device), 128, 128);
      REQUIRE(entropy.scalar_type() == dtype);
      for (int64_t i = 0; i < 8; ++i) {
        REQUIRE(std::abs(entropy[i].item<double>() - static_cast<double>(i) / 7.0) < 1e-5);
        REQUIRE(std::abs(erank[i].item<double>() / (1 << i) - 1.0) < 1e-5);
      }
    }
  }
}

TEST_CASE("an unknown kind is refused by name", "[matrix_entropy]") {
  REQUIRE_THROWS_WITH(uncomp::matrix_entropy(at::zeros({4}), 2, 4, "shannon"),
                      uncomp::test::ContainsSubstring("uncomp::matrix_entropy: kind must be"));
}
