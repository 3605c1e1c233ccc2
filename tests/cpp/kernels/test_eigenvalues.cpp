// SPDX-License-Identifier: Apache-2.0
// The eigenvalue stage of matrix_spectrum by itself: spectra that are hard on reflectors and counts, every kernel,
// sizes around their borders, and the same bits however often and beside whatever else it is launched.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "core/householder.h"
#include "core/sturm.h"
#include "kernels/matrix_spectrum/stages.h"
#include "support/catch.hpp"
#include "support/device.hpp"
#include "support/repeat.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

constexpr int kKinds = 8;

constexpr int tile_of(int n) { return n <= 64 ? 64 : n <= 128 ? 128 : 256; }

/// Symmetric and positive semidefinite [tile, tile], zero from row n on.
std::vector<float> make_matrix(int kind, int n, unsigned seed) {
  const int tile = tile_of(n), tokens = kind == 1 ? 1 : kind == 2 ? 4 : 2 * n;
  std::mt19937 random(seed * 8u + static_cast<unsigned>(kind));
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(tokens) * n), m(static_cast<size_t>(tile) * tile, 0.0f);
  for (int t = 0; t < tokens; ++t) {
    for (int j = 0; j < n; ++j) {
      const float z = normal(random);
      float& to = x[static_cast<size_t>(t) * n + j];
      if (kind <= 2) to = z;                                                            // full rank, rank 1, rank 4
      if (kind == 3) to = std::pow(0.6f, static_cast<float>(j)) * z;                    // fades below every tolerance
      if (kind == 4) to = t == j ? 1.0f : 0.0f;                                         // all equal, already diagonal
      if (kind == 5) to = t / 16 == j / 16 && t < n ? z : 0.0f;                         // falls apart into blocks
      if (kind == 6) to = 1.0f + 1e-3f * z;                                             // one large, the rest at 1e-6
      if (kind == 7) to = t == j || (j > 0 && t == j - 1) ? 1.0f - 0.5f * (t % 2) : 0;  // already tridiagonal
    }
  }
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = 0.0;
      for (int t = 0; t < tokens; ++t) sum += static_cast<double>(x[t * n + i]) * x[t * n + j];
      m[i * tile + j] = m[j * tile + i] = static_cast<float>(256.0 * sum);
    }
  }
  return m;
}

std::vector<double> oracle(const std::vector<float>& matrix, int n) {
  const int tile = tile_of(n);
  std::vector<double> a(static_cast<size_t>(n) * n), diagonal(n), coupling(n), scratch(2 * n), out(n);
  double trace = 0.0;
  for (int i = 0; i < n; ++i) trace += matrix[i * tile + i];
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) a[i * n + j] = matrix[i * tile + j] / trace;
  }
  tridiagonalize(a.data(), n, diagonal.data(), coupling.data(), scratch.data());
  std::vector<TridiagonalRow<double>> rows(n);
  for (int i = 0; i < n; ++i) rows[i] = tridiagonal_row(diagonal[i], coupling[i]);
  top_eigenvalues(rows.data(), n, n, out.data());
  return out;
}

/// A batch of matrices on the device and its launch.
struct Batch {
  int n, count, top;
  bool packed;  // the kernel for devices without clusters
  DeviceArray<float> gram, spectrum;

  Batch(const std::vector<float>& matrices, int dim, int wanted, bool without_clusters = false)
      : n(dim),
        count(static_cast<int>(matrices.size()) / (tile_of(dim) * tile_of(dim))),
        top(wanted),
        packed(without_clusters),
        gram(matrices),
        spectrum(static_cast<size_t>(count) * wanted) {}

  void launch(cudaStream_t stream = nullptr) {
    kernels::MatrixSpectrumParams params{};
    params.spectrum = spectrum.data();
    params.batch = 1;
    params.heads = count;
    params.dim = n;
    params.top = top;
    SpectrumPlan plan{};
    plan.tile = tile_of(n);
    cuda_ok(packed ? kernels::packed_eigenvalues(params, gram.data(), stream)
                   : kernels::eigenvalues(params, plan, gram.data(), stream));
  }
  void poison() { spectrum.fill(0xff); }
  Bytes results() const { return contents(spectrum); }
};

std::vector<float> all_kinds(int n, unsigned seed) {
  std::vector<float> all;
  for (int kind = 0; kind < kKinds; ++kind) {
    const auto m = make_matrix(kind, n, seed);
    all.insert(all.end(), m.begin(), m.end());
  }
  return all;
}

void compare(int n, std::vector<int> tops, bool packed = false) {
  const auto all = all_kinds(n, static_cast<unsigned>(n));
  const size_t words = all.size() / kKinds;
  std::vector<std::vector<double>> want;
  for (int kind = 0; kind < kKinds; ++kind) {
    want.push_back(oracle({all.begin() + kind * words, all.begin() + (kind + 1) * words}, n));
  }
  for (const int top : tops) {
    Batch batch(all, n, top, packed);
    batch.launch();
    const auto got = batch.spectrum.host();
    REQUIRE(batch.spectrum.guards_intact());
    for (int kind = 0; kind < kKinds; ++kind) {
      for (int r = 0; r < top; ++r) {
        const float x = got[kind * top + r];
        if (!(std::abs(x - want[kind][r]) < 5e-7)) {
          FAIL("n " << n << " top " << top << " kind " << kind << " eigenvalue " << r << ": got " << x << ", want "
                    << want[kind][r]);
        }
        REQUIRE((r == 0 || x <= got[kind * top + r - 1]));
      }
    }
  }
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("hard spectra of every kernel", "[eigenvalues]") {
  for (const int n : {2, 33, 64, 65, 128}) compare(n, {1, ceil_div(n, 4), n});
  compare(129, {33, 129});
  compare(129, {129}, true);
}

TEST_CASE("hard spectra of sizes around every border", "[eigenvalues][large]") {
  for (const int n : {3, 4, 31, 32, 34, 63, 66, 95, 96, 97, 100, 127}) compare(n, {1, 2, ceil_div(n, 4), n - 1, n});
  for (const int n : {130, 159, 160, 161, 192, 224, 225, 255, 256}) {
    compare(n, {1, 2, 3, 5, 64, 127, 128, n});
    compare(n, {1, ceil_div(n, 4), n}, true);
  }
}

TEST_CASE("degenerate matrices stay by themselves", "[eigenvalues]") {
  for (const int n : {40, 100, 200}) {
    for (const bool packed : {false, true}) {
      if (packed && n <= 128) continue;
      auto all = all_kinds(n, 1u);
      const size_t words = all.size() / kKinds;
      std::fill_n(all.begin() + words, words, 0.0f);
      all[2 * words] = std::numeric_limits<float>::quiet_NaN();
      all[3 * words + tile_of(n) + 1] = std::numeric_limits<float>::infinity();
      Batch batch(all, n, n, packed);
      batch.launch();
      const auto got = batch.spectrum.host();
      for (int r = 0; r < n; ++r) {
        REQUIRE(got[r] == got[r]);
        REQUIRE(got[n + r] == 0.0f);
        REQUIRE(got[2 * n + r] != got[2 * n + r]);
        REQUIRE(got[3 * n + r] != got[3 * n + r]);
        REQUIRE(std::abs(got[4 * n + r] - 1.0f / static_cast<float>(n)) < 5e-7f);
      }
    }
  }
}

TEST_CASE("more matrices than fit at once, launch after launch and on two streams: the same bits",
          "[eigenvalues][large]") {
  for (const int n : {64, 128, 256}) {
    const auto eight = all_kinds(n, 9u);
    std::vector<float> many;
    for (int q = 0; q < 75; ++q) many.insert(many.end(), eight.begin(), eight.end());
    Batch one(eight, n, n), all(many, n, n), beside(eight, n, n);
    one.launch();
    const auto want = one.spectrum.host();
    all.launch();
    const auto got = all.spectrum.host();
    for (int q = 0; q < 75; ++q) {
      REQUIRE(same_bits({got.begin() + q * want.size(), got.begin() + (q + 1) * want.size()}, want));
    }
    require_apart(10, 100, one, beside);
    REQUIRE(same_bits(beside.spectrum.host(), want));
  }
}

TEST_CASE("a captured launch sees what the matrices have become", "[eigenvalues]") {
  for (const int n : {128, 200}) {
    Batch batch(all_kinds(n, 2u), n, n), other(all_kinds(n, 3u), n, n);
    other.launch();
    const auto want = other.spectrum.host();
    const auto change = [&](int) { batch.gram.assign(all_kinds(n, 3u)); };
    require_graph_follows(batch, 1, change, [&](int) { REQUIRE(same_bits(batch.spectrum.host(), want)); });
  }
}
