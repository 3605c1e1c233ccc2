// SPDX-License-Identifier: Apache-2.0
// The launches themselves: all tiles and types, aligned and not, ragged lengths, NaN outside the real tokens,
// degenerate heads, and nothing written outside the buffers.
#include "support/catch.hpp"
#include "support/spectrum_problem.hpp"

using namespace uncomp;
using namespace uncomp::test;
using namespace uncomp::test::spectrum;

namespace {

std::vector<float> launch(const Problem& p, int top, bool vectors) {
  Call call(p, top, vectors);
  call.poison();
  call.launch(nullptr);
  const std::vector<float> got = call.spectrum.host();
  REQUIRE(call.spectrum.guards_intact());
  REQUIRE(call.workspace->guards_intact());
  call.launch(nullptr);
  REQUIRE(same_bits(call.spectrum.host(), got));
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
void check_degenerate(int dim, bool half, int seq_len) {
  Problem p = make_problem(4, 2, seq_len, dim, dim, half);
  for (int s = 0; s < seq_len; ++s) {
    for (int j = 0; j < dim; ++j) p.token(0, 1, s)[j] = 0.1f * static_cast<float>(j + 1);
  }
  p.length[1] = 1;
  p.length[2] = 0;
  p.token(3, 1, 7)[dim - 1] = kNan;
  round_values(p);
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
  for (const int dim : {64, 128, 136}) check_degenerate(dim, false, 50);
  check_degenerate(64, true, 50);
  check_degenerate(128, true, 2000);
}

TEST_CASE("equal tokens, one token, no token and NaN at full width", "[matrix_spectrum][large]") {
  check_degenerate(256, false, 50);
}

TEST_CASE("heads over clusters of every size, few tokens and many", "[matrix_spectrum]") {
  // Around the tiles of 32 and 64 tokens, the ring of a warpgroup, and the border of 1024 tokens.
  for (const int seq_len : {31, 33, 97, 600, 1024, 1025, 3500}) {
    for (const int heads : {1, 3, 40}) {
      if (heads * seq_len > 40000) continue;
      Problem p = make_problem(1, heads, seq_len, seq_len == 97 ? 64 : 128, 128, true);
      compare(p, 8, true);
    }
  }
}

TEST_CASE("heads of few tokens around the passes of 16 and the border of 256", "[matrix_spectrum]") {
  for (const int seq_len : {1, 2, 15, 16, 17, 129, 255, 256, 257}) {
    for (const int dim : {40, 64, 80, 128}) {
      Problem p = make_problem(2, 3, seq_len, dim, dim + 8, true);
      compare(p, dim / 2, true);
    }
  }
  for (const int dim : {64, 128}) check_degenerate(dim, true, 129);
}
