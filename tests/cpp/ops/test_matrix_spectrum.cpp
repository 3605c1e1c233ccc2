// SPDX-License-Identifier: Apache-2.0
// The covariance must be the method's: mean away, unit tokens, trace one, on every device and in every layout.
#include "ops/matrix_spectrum.h"

#include "support/precompiled.hpp"
#include "support/torch.hpp"

namespace {

/// float64 on the CPU, by the definition and LAPACK.
at::Tensor by_definition(const at::Tensor& rows) {
  const at::Tensor centred = rows.cpu().to(at::kDouble) - rows.cpu().to(at::kDouble).mean(0, true);
  const at::Tensor unit = centred / centred.norm(2, {1}, true);
  const at::Tensor gram = at::mm(unit.t(), unit);
  return at::linalg_eigvalsh(gram / gram.trace()).flip(0);
}

}  // namespace

TEST_CASE("equals the definition for every dtype and odd widths", "[matrix_spectrum]") {
  for (const at::Device device : uncomp::test::devices()) {
    for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
      for (const int64_t dim : {2, 7, 64, 80, 128, 200, 256}) {
        const at::Tensor states = at::randn({1, 2, 300, dim}).to(device, dtype);
        const at::Tensor got = uncomp::matrix_spectrum(states, std::nullopt, std::nullopt, dim).cpu();
        REQUIRE(got.scalar_type() == at::kFloat);
        const double tolerance = device.is_cpu() || dtype == at::kFloat ? 1e-6 : 2e-5;
        for (int64_t h = 0; h < 2; ++h) {
          const double off = (got[0][h] - by_definition(states[0][h])).abs().max().item<double>();
          if (!(off < tolerance)) FAIL(device << " " << dtype << " D " << dim << " off by " << off);
        }
      }
    }
  }
}

TEST_CASE("padding with NaN has no effect; a sequence without tokens is all zero", "[matrix_spectrum]") {
  for (const at::Device device : uncomp::test::devices()) {
    const at::Tensor states = at::randn({3, 2, 20, 16}, at::device(device));
    const at::Tensor first = at::tensor({5, 0, 20}, at::kInt).to(device);
    const at::Tensor length = at::tensor({12, 20, 0}, at::kInt).to(device);
    const at::Tensor alone = uncomp::matrix_spectrum(states.slice(2, 5, 17), std::nullopt, std::nullopt, 8);
    states[0].slice(1, 0, 5).fill_(NAN);
    states[0].slice(1, 17).fill_(NAN);
    const at::Tensor got = uncomp::matrix_spectrum(states, first, length, 8);
    REQUIRE((got[0] - alone[0]).abs().max().item<double>() < 1e-6);
    REQUIRE(at::equal(got[2], at::zeros_like(got[2])));
  }
}

TEST_CASE("more channels than the CPU's own solver takes", "[matrix_spectrum]") {
  const at::Tensor states = at::randn({1, 1, 40, 300}, at::kDouble);
  const at::Tensor got = uncomp::matrix_spectrum(states, std::nullopt, std::nullopt, 300);
  REQUIRE((got[0][0] - by_definition(states[0][0])).abs().max().item<double>() < 1e-12);
}

TEST_CASE("limits and dtypes are refused by name", "[matrix_spectrum]") {
  REQUIRE_THROWS_WITH(
      uncomp::matrix_spectrum(at::zeros({1, 1, 4, 8}, at::kInt), std::nullopt, std::nullopt, 1),
      uncomp::test::ContainsSubstring("uncomp::matrix_spectrum: states must be float64, float32, float16 or bfloat16"));
  REQUIRE_THROWS_WITH(uncomp::matrix_spectrum(at::zeros({1, 1, 4, 8}), std::nullopt, std::nullopt, 9),
                      uncomp::test::ContainsSubstring("top must lie in [1, 8]; got 9"));
  for (const at::Device device : uncomp::test::devices()) {
    if (device.is_cpu()) continue;
    REQUIRE_THROWS_WITH(
        uncomp::matrix_spectrum(at::zeros({1, 1, 4, 257}, at::device(device)), std::nullopt, std::nullopt, 1),
        uncomp::test::ContainsSubstring("at most 256 channels on CUDA (the CPU takes any); got 257"));
  }
}
