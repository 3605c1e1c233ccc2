// SPDX-License-Identifier: Apache-2.0
// The launches themselves against plain loops: every tile, group and window packing, run borders, skewed arenas,
// padding of NaN, guard bands, repeated bits.
#include "kernels/window_scores/window_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <random>

#include "support/catch.hpp"
#include "support/device.hpp"
#include "support/half.hpp"
#include "support/repeat.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

struct Problem {
  std::vector<int32_t> len;  // tokens of each row; all rows of a dense sequence have the same
  int32_t rows_per_sequence = 2, group = 2, window = 8, dim = 64, value_dim = 0;
  bool arena = false;
  Reduce reduce_window = Reduce::sum, reduce_group = Reduce::mean;
  DType dtype = DType::float16;
  int32_t spare = 5;       // dead slots of a row, or columns of padding before and behind
  float sharpness = 1.0f;  // of the logits
};

/// Softmax weights of one query on n keys in double, and their lse.
double weights_of(const float* query, const float* keys, int32_t seen, int32_t dim, double scale,
                  std::vector<double>& weight) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int32_t j = 0; j < seen; ++j) {
    double dot = 0;
    for (int32_t d = 0; d < dim; ++d) dot += double{query[d]} * keys[int64_t{j} * dim + d];
    weight[j] = dot * scale;
    top = std::max(top, weight[j]);
  }
  for (int32_t j = 0; j < seen; ++j) sum += std::exp(weight[j] - top);
  const double lse = top + std::log(sum);
  for (int32_t j = 0; j < seen; ++j) weight[j] = std::exp(weight[j] - lse);
  return lse;
}

void run(const Problem& p) {
  CAPTURE(p.group, p.window, p.dim, p.value_dim, p.arena, static_cast<int>(p.dtype), static_cast<int>(p.reduce_group));
  const int32_t rows = static_cast<int32_t>(p.len.size()), batch = rows / p.rows_per_sequence;
  const int32_t heads = p.rows_per_sequence * p.group;
  const float scale = p.sharpness / std::sqrt(static_cast<float>(p.dim));
  const int32_t longest = *std::max_element(p.len.begin(), p.len.end());
  const int32_t width = longest + 2 * p.spare;
  // Dense rows lie `width` apart, rows of an arena follow each other.
  std::vector<int32_t> start{0}, first, length;
  for (int32_t r = 0; r < rows; ++r) start.push_back(start.back() + (p.arena ? p.len[r] + p.spare : width));
  for (int32_t b = 0; b < batch; ++b) {
    first.push_back(p.spare);
    length.push_back(p.len[b * p.rows_per_sequence]);
  }
  const int64_t slots = start.back();
  const auto token0 = [&](int32_t r) { return start[r] + (p.arena ? 0 : p.spare); };
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> query(static_cast<size_t>(batch) * heads * p.window * p.dim);
  std::vector<float> key(slots * p.dim, std::nanf("")), value(slots * std::max(p.value_dim, 8), std::nanf(""));
  for (float& x : query) x = rounded(normal(random), p.dtype);
  for (int32_t r = 0; r < rows; ++r) {
    for (int64_t s = token0(r); s < token0(r) + p.len[r]; ++s) {
      for (int32_t d = 0; d < p.dim; ++d) key[s * p.dim + d] = rounded(normal(random), p.dtype);
      for (int32_t d = 0; d < p.value_dim; ++d) value[s * p.value_dim + d] = rounded(normal(random), p.dtype);
    }
  }

  const int32_t heads_out = p.reduce_group == Reduce::none ? p.group : 1;
  DeviceArray<unsigned char> q(encoded(query, p.dtype)), k(encoded(key, p.dtype)), v(encoded(value, p.dtype));
  DeviceArray<int32_t> starts(start), lens(p.len), firsts(first), lengths(length);
  DeviceArray<float> scores(static_cast<size_t>(rows) * heads_out * width);
  DeviceArray<float> lse(static_cast<size_t>(batch) * heads * p.window);
  kernels::WindowScoresParams params{};
  params.query = q.data();
  params.key = k.data();
  params.value = p.value_dim > 0 ? v.data() : nullptr;
  params.rows.rows_per_sequence = p.rows_per_sequence;
  if (p.arena) {
    params.rows.arena = {starts.data(), lens.data(), slots, rows};
  } else {
    params.rows.dense = {firsts.data(), lengths.data(), width};
  }
  const auto strides = [&](int64_t dim) {
    return p.arena ? Strides3{0, 0, dim} : Strides3{p.rows_per_sequence * width * dim, width * dim, dim};
  };
  params.query_stride = {int64_t{heads} * p.window * p.dim, int64_t{p.window} * p.dim, p.dim};
  params.key_stride = strides(p.dim);
  params.value_stride = strides(p.value_dim);
  params.scores = scores.data();
  params.lse = lse.data();
  params.batch = batch;
  params.num_q_heads = heads;
  params.window = p.window;
  params.head_dim = p.dim;
  params.value_dim = p.value_dim;
  params.num_rows = rows;
  params.group_size = p.group;
  params.width = width;
  params.scale = scale;
  params.reduce_window = p.reduce_window;
  params.reduce_group = p.reduce_group;
  params.dtype = p.dtype;
  size_t bytes = 0;
  cuda_ok(kernels::window_scores_workspace_bytes(params, &bytes));
  DeviceArray<unsigned char> work(bytes);
  cuda_ok(kernels::window_scores(params, work.data(), nullptr));
  const std::vector<float> got = scores.host(), got_lse = lse.host();
  REQUIRE(scores.guards_intact());
  REQUIRE(lse.guards_intact());
  REQUIRE(work.guards_intact());
  cuda_ok(kernels::window_scores(params, work.data(), nullptr));
  REQUIRE(scores.host() == got);
  REQUIRE(lse.host() == got_lse);

  for (int32_t r = 0; r < rows; ++r) {
    const int32_t n = p.len[r], exist = std::min(p.window, n);
    std::vector<std::vector<double>> mass(p.group, std::vector<double>(width, 0.0));
    for (int32_t h = 0; h < p.group; ++h) {
      const int64_t head = int64_t{r} * p.group + h;
      for (int32_t i = 0; i < p.window; ++i) {
        const float at = got_lse[head * p.window + i];
        const int32_t seen = n - p.window + i + 1;
        if (seen <= 0) {
          if (at != -std::numeric_limits<float>::infinity()) FAIL("lse of a missing query, row " << r);
          continue;
        }
        std::vector<double> weight(seen);
        const double want = weights_of(&query[(head * p.window + i) * p.dim], &key[int64_t{token0(r)} * p.dim], seen,
                                       p.dim, scale, weight);
        if (!(std::abs(at - want) < 1e-4)) FAIL("lse of row " << r << ": " << at << " for " << want);
        for (int32_t j = 0; j < seen; ++j) mass[h][j] += weight[j];
      }
    }
    for (int32_t out = 0; out < heads_out; ++out) {
      std::vector<double> want(width, 0.0);
      double largest = 0;
      for (int32_t j = 0; j < n; ++j) {
        for (int32_t h = 0; h < p.group; ++h) {
          if (p.reduce_group == Reduce::none && h != out) continue;
          want[j] = p.reduce_group == Reduce::max ? std::max(want[j], mass[h][j]) : want[j] + mass[h][j];
        }
        if (p.reduce_group == Reduce::mean) want[j] /= p.group;
        if (p.reduce_window == Reduce::mean) want[j] /= exist;
        double squares = 0;
        for (int32_t d = 0; d < p.value_dim; ++d) {
          const double x = value[(int64_t{token0(r)} + j) * p.value_dim + d];
          squares += x * x;
        }
        if (p.value_dim > 0) want[j] *= std::sqrt(squares);
        largest = std::max(largest, want[j]);
      }
      for (int32_t j = 0; j < width; ++j) {
        const float x = got[(int64_t{r} * heads_out + out) * width + j];
        if (j >= n ? x != 0.0f : !(std::abs(x - want[j]) <= 2e-3 * largest + 1e-6)) {
          FAIL("row " << r << " head " << out << " column " << j << ": " << x << " for " << want[j]);
        }
      }
    }
  }
}

/// One dense problem that stays on the device, for many launches.
struct Launch {
  static constexpr int32_t kRows = 4, kGroup = 4, kDim = 128;

  Launch(int32_t tokens, int32_t window, uint32_t seed)
      : query(bytes_of(size_t{kRows} * kGroup * window * kDim, seed)),
        key(bytes_of(size_t{kRows} * tokens * kDim, seed + 1)),
        length(std::vector<int32_t>{tokens}),
        scores(size_t{kRows} * tokens),
        lse(size_t{kRows} * kGroup * window) {
    params.query = query.data();
    params.key = key.data();
    params.rows.rows_per_sequence = kRows;
    params.rows.dense = {nullptr, length.data(), tokens};
    params.query_stride = {kRows * kGroup * window * kDim, window * kDim, kDim};
    params.key_stride = {int64_t{kRows} * tokens * kDim, int64_t{tokens} * kDim, kDim};
    params.scores = scores.data();
    params.lse = lse.data();
    params.batch = 1;
    params.num_q_heads = kRows * kGroup;
    params.window = window;
    params.head_dim = kDim;
    params.num_rows = kRows;
    params.group_size = kGroup;
    params.width = tokens;
    params.scale = 0.1f;
    params.reduce_window = Reduce::sum;
    params.reduce_group = Reduce::mean;
    params.dtype = DType::bfloat16;
    size_t bytes = 0;
    cuda_ok(kernels::window_scores_workspace_bytes(params, &bytes));
    work.emplace(bytes);
  }

  static std::vector<unsigned char> bytes_of(size_t count, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& x : values) x = rounded(normal(random), DType::bfloat16);
    return encoded(values, DType::bfloat16);
  }
  void launch(cudaStream_t stream) { cuda_ok(kernels::window_scores(params, work->data(), stream)); }
  void poison() {
    work->fill(0xff);
    scores.fill(0xff);
    lse.fill(0xff);
  }
  Bytes results() const { return contents(scores, lse); }

  DeviceArray<unsigned char> query, key;
  DeviceArray<int32_t> length;
  DeviceArray<float> scores, lse;
  kernels::WindowScoresParams params{};
  std::optional<DeviceArray<unsigned char>> work;
};

}  // namespace

TEST_CASE("every head dim and dtype", "[window_scores]") {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const int32_t dim : {8, 64, 80, 96, 128, 200, 256}) run({.len = {300, 300}, .dim = dim, .dtype = dtype});
  }
}

TEST_CASE("every packing of heads and window", "[window_scores]") {
  for (const Reduce reduce : {Reduce::mean, Reduce::sum, Reduce::max, Reduce::none}) {
    for (const int32_t window : {1, 7, 8, 33, 64}) {
      for (const int32_t group : {1, 3, 7, 16}) {
        run({.len = {150, 150}, .group = group, .window = window, .dim = 128, .reduce_group = reduce});
      }
    }
    run({.len = {150}, .rows_per_sequence = 1, .group = 16, .window = 64, .dim = 256, .reduce_group = reduce});
  }
}

TEST_CASE("token counts around tiles, runs and the window; sequences shorter than it", "[window_scores]") {
  for (const int32_t n : {8, 9, 31, 32, 33, 127, 128, 129, 255, 1023, 5000}) run({.len = {n, n}});
  run({.len = {0, 0, 3, 3, 1, 1, 200, 200}, .reduce_window = Reduce::mean});
  run({.len = {0, 0, 3, 3, 1, 1, 200, 200}, .group = 7, .window = 33, .reduce_group = Reduce::max});
}

TEST_CASE("rows of an arena, however skewed", "[window_scores]") {
  run({.len = {0, 1, 700, 40, 5, 4000}, .arena = true});
  run({.len = {0, 0, 0, 0}, .arena = true});
  run({.len = std::vector<int32_t>(96, 77), .group = 4, .arena = true, .spare = 0});
  run({.len = {0, 1, 700, 40, 5, 4000}, .dim = 256, .arena = true, .dtype = DType::bfloat16});
  run({.len = {0, 1, 700, 40, 5, 4000}, .arena = true, .dtype = DType::float32});
}

TEST_CASE("norms of values multiply the scores", "[window_scores]") {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const int32_t value_dim : {8, 72, 256}) {
      run({.len = {90, 90}, .value_dim = value_dim, .dtype = dtype});
      run({.len = {90, 1}, .value_dim = value_dim, .arena = true, .reduce_group = Reduce::none, .dtype = dtype});
    }
  }
}

TEST_CASE("token counts around the tiles of every head dim", "[window_scores]") {
  for (const int32_t dim : {64, 128, 256}) {
    for (const int32_t n : {31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 640, 641, 705}) {
      run({.len = {n, n}, .dim = dim, .dtype = DType::bfloat16});
    }
    for (const int32_t group : {1, 4, 5, 8, 12}) {
      for (const int32_t window : {16, 17, 48}) {
        run({.len = {1100}, .rows_per_sequence = 1, .group = group, .window = window, .dim = dim});
      }
    }
  }
}

TEST_CASE("flat, sharp and negative scales", "[window_scores]") {
  for (const float sharpness : {0.0f, -1.0f, 1e-30f, 8.0f, -8.0f}) {
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
      run({.len = {700, 700}, .window = 32, .dtype = dtype, .sharpness = sharpness});
      run({.len = {700, 5}, .arena = true, .dtype = dtype, .sharpness = sharpness});
    }
  }
}

TEST_CASE("more rows than blocks fit at once", "[window_scores]") {
  run({.len = std::vector<int32_t>(400, 70), .dim = 64});
  run({.len = std::vector<int32_t>(1200, 9), .window = 3, .dim = 64, .arena = true, .spare = 1});
  std::vector<int32_t> skewed(500, 2);
  skewed[123] = 20000;
  run({.len = skewed, .window = 3, .dim = 64, .arena = true, .spare = 1});
}

TEST_CASE("many runs of a long row", "[window_scores]") {
  run({.len = {70000}, .rows_per_sequence = 1, .group = 4, .dim = 128, .dtype = DType::bfloat16});
}

TEST_CASE("ten thousand launches write the bits of the first", "[window_scores][large]") {
  for (const int32_t window : {8, 32, 64}) {
    Launch call(3000, window, 7);
    require_repeats(call, 3400, 34);
  }
}

TEST_CASE("two streams at once do not meet", "[window_scores][large]") {
  Launch a(3000, 8, 1), b(1777, 32, 2);
  require_apart(20, 50, a, b);
}

TEST_CASE("a captured graph follows the lengths and needs no clean workspace", "[window_scores][large]") {
  Launch call(3000, 16, 3);
  const std::vector<int32_t> lengths = {3000, 0, 1, 15, 16, 17, 2999, 64, 640, 2048, 3000};
  require_graph_follows(call, static_cast<int>(lengths.size()), [&](int step) { call.length.assign({lengths[step]}); });
}

TEST_CASE("rows of random lengths", "[window_scores][large]") {
  std::mt19937 random(11);
  for (int trial = 0; trial < 12; ++trial) {
    std::vector<int32_t> len(6 + 2 * (trial % 5));
    for (int32_t& n : len) n = random() % 3 == 0 ? random() % 9 : random() % 3000;
    run({.len = len,
         .group = 1 + trial % 5,
         .window = 1 + static_cast<int32_t>(random() % 40),
         .dim = 128,
         .arena = true});
  }
}
