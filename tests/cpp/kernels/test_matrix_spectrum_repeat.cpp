// SPDX-License-Identifier: Apache-2.0
// matrix_spectrum over and over: back to back, on two streams, in a graph whose lengths change.
#include "support/catch.hpp"
#include "support/repeat.hpp"
#include "support/spectrum_problem.hpp"

using namespace uncomp;
using namespace uncomp::test;
using namespace uncomp::test::spectrum;

TEST_CASE("launches that follow each other at once repeat the first one's bits",
          "[matrix_spectrum_repeat][matrix_spectrum][large]") {
  for (const bool half : {false, true}) {
    Call call(make_problem(3, 8, 1500, 128, 128, half), 32, true);
    require_repeats(call, 1000, 100);
  }
}

TEST_CASE("spectra of two streams at once do not meet", "[matrix_spectrum_repeat][matrix_spectrum][large]") {
  Call long_heads(make_problem(1, 4, 5000, 128, 128, true), 32, true);
  Call many_heads(make_problem(2, 40, 700, 64, 64, true), 16, true);
  require_apart(50, 5, long_heads, many_heads);
}

TEST_CASE("a captured graph follows the lengths on the device", "[matrix_spectrum_repeat][matrix_spectrum][large]") {
  Problem p = make_problem(2, 6, 3000, 128, 128, true);
  p.first = {0, 0};
  Call call(p, 32, true);
  const std::vector<std::vector<int32_t>> lengths = {{3000, 1}, {0, 2999}, {1024, 1025}, {31, -5}, {9999, 2}};
  require_graph_follows(call, static_cast<int>(lengths.size()), [&](int step) { call.length.assign(lengths[step]); });
}
