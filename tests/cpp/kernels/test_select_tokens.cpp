// SPDX-License-Identifier: Apache-2.0
// The launch itself against a stable sort on the host: one block, clusters, keys in the workspace,
// row_start alone; many launches, streams and graph replays.
#include "kernels/select_tokens.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "core/select_keys.h"
#include "support/catch.hpp"
#include "support/device.hpp"
#include "support/repeat.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

struct Case {
  int32_t rows, columns, stride, sink, window, pool;
  Pool mode;
  int kind;     // of scores
  int32_t cut;  // entries that total_keep is below (positive) or above (negative) the sum
  int32_t most = std::numeric_limits<int32_t>::max();   // tokens of every row but the first
  int32_t first = std::numeric_limits<int32_t>::max();  // tokens of the first row; by default it fills its columns
};

std::vector<float> make_scores(const Case& c, std::mt19937& random) {
  std::vector<float> scores(static_cast<size_t>(c.rows) * c.stride);
  for (float& x : scores) {
    const uint32_t bits = random();
    switch (c.kind) {
      case 0:
        x = static_cast<float>(bits) * 0x1p-32f;
        break;
      case 1:
        x = std::bit_cast<float>(bits);  // every float there is: NaN, infinite, denormal
        break;
      case 2:
        x = bits % 100 == 0 ? static_cast<float>(bits) * 0x1p-32f : 0.5f;
        break;
      default:
        x = 1.0f;
    }
  }
  return scores;
}

void check(const Case& c) {
  std::mt19937 random(static_cast<uint32_t>(c.rows * 31 + c.columns + c.kind));
  const std::vector<float> scores = make_scores(c, random);
  std::vector<int32_t> length(c.rows), keep(c.rows), want, start{0};
  for (int32_t r = 0; r < c.rows; ++r) {
    length[r] =
        r == 0 ? std::min(c.columns, c.first) : static_cast<int32_t>(random() % (std::min(c.columns, c.most) + 1));
    keep[r] = r % 7 == 6 ? c.columns : length[r] / (1 + static_cast<int32_t>(random() % 30));
    const SelectRow row = select_row(length[r], keep[r], c.columns, c.sink, c.window);
    const float* x = &scores[static_cast<size_t>(r) * c.stride];
    const int32_t end = row.tokens - row.tail;
    std::vector<uint32_t> key(end);
    const auto load = [&](int32_t j) { return x[j]; };
    for (int32_t j = row.head; j < end; ++j) key[j] = pooled_key(load, j, c.pool / 2, end, c.mode);
    std::vector<int32_t> order(end - row.head);
    std::iota(order.begin(), order.end(), row.head);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return key[a] > key[b]; });
    std::vector<int32_t> kept(order.begin(), order.begin() + row.need);
    for (int32_t j = 0; j < row.head; ++j) kept.push_back(j);
    for (int32_t j = end; j < row.tokens; ++j) kept.push_back(j);
    std::sort(kept.begin(), kept.end());
    want.insert(want.end(), kept.begin(), kept.end());
    start.push_back(static_cast<int32_t>(want.size()));
  }
  const int32_t total = static_cast<int32_t>(want.size()) - c.cut;
  want.resize(total, -1);
  for (int32_t& s : start) s = std::min(s, total);

  DeviceArray<float> d_scores(scores);
  DeviceArray<int32_t> d_length(length), d_keep(keep), index(total), row_start(c.rows + 1);
  const kernels::SelectTokensParams params{
      d_scores.data(), d_length.data(), d_keep.data(), index.data(), row_start.data(), c.stride, c.rows,
      c.columns,       total,           c.sink,        c.window,     c.pool,           c.mode};
  int64_t bytes = 0;
  cuda_ok(kernels::select_tokens_workspace_bytes(params, &bytes));
  DeviceArray<unsigned char> workspace(static_cast<size_t>(bytes));
  for (int launch = 0; launch < 2; ++launch) {
    cuda_ok(kernels::select_tokens(params, workspace.data(), nullptr));
    const std::vector<int32_t> got = index.host(), got_start = row_start.host();
    if (got_start != start) FAIL("row_start of " << c.rows << " x " << c.columns << " kind " << c.kind);
    if (got != want) FAIL("index of " << c.rows << " x " << c.columns << " kind " << c.kind << " pool " << c.pool);
  }
  REQUIRE(index.guards_intact());
  REQUIRE(row_start.guards_intact());
  REQUIRE(workspace.guards_intact());
}

}  // namespace

TEST_CASE("equals a stable sort for every kind of scores and pool", "[select_tokens]") {
  for (int kind = 0; kind < 4; ++kind) {
    const Pool mode = kind % 2 == 0 ? Pool::max : Pool::avg;
    for (const int32_t columns : {1, 127, 513, 4099}) {
      for (const int32_t pool : {1, 7}) check({3, columns, columns + 3, 2, 8, pool, mode, kind, 0});
    }
    check({3, 127, 130, 2, 8, 129, mode, kind, 0});
    check({3, 513, 516, 2, 8, 129, mode, kind, 0});
  }
}

// The fewest columns and rows that make the launch of its shape on 108 to 132 multiprocessors.
TEST_CASE("equals a stable sort for every launch shape", "[select_tokens]") {
  check({8, 16384, 16384, 0, 8, 7, Pool::max, 2, 0});      // clusters of 8
  check({2, 33000, 33003, 4, 32, 3, Pool::avg, 0, 0});     // clusters of 8, more; rows without 16-byte borders
  check({2, 33000, 33001, 4, 32, 9, Pool::max, 3, 0});     // equal keys: digits of the places
  check({20, 8200, 8200, 0, 0, 3, Pool::max, 2, 0});       // clusters of 4
  check({40, 4100, 4101, 1, 1, 11, Pool::avg, 0, 0});      // clusters of 2
  check({70, 2100, 2100, 4, 8, 7, Pool::max, 2, 0, 500});  // one block a row
  check({5, 2048, 2051, 4, 8, 5, Pool::max, 1, 0});        // the longest short row, and one longer
  check({5, 2052, 2053, 4, 8, 5, Pool::avg, 1, 0});
  check({260, 300, 300, 4, 8, 7, Pool::avg, 0, 0});                 // row_start in its own launch
  check({1, 430000, 430000, 4, 8, 9, Pool::max, 2, 0, 0, 140000});  // a cluster with keys in the workspace
  check({70, 60000, 60000, 4, 8, 7, Pool::avg, 0, 0, 500, 20000});  // blocks with keys in the workspace
}

TEST_CASE("equals a stable sort at scale", "[select_tokens][large]") {
  for (int kind = 0; kind < 4; ++kind) {
    for (const int32_t pool : {1, 7, 129}) {
      const Pool mode = kind % 2 == 0 ? Pool::max : Pool::avg;
      for (const int32_t columns : {31, 128, 1024, 4099}) check({9, columns, columns + 3, 2, 8, pool, mode, kind, 0});
      check({8, 8192, 8192, 0, 8, pool, mode, kind, 0});
      check({8, 32768, 32771, 4, 32, pool, mode, kind, 0});
      check({30, 20000, 20000, 0, 0, pool, mode, kind, 0});
      check({60, 5001, 5001, 1, 1, pool, mode, kind, 0});
      check({150, 3000, 3000, 4, 8, pool, mode, kind, 0});
      check({300, 700, 700, 4, 8, pool, mode, kind, 0});
      check({1, 500000, 500000, 4, 8, pool, mode, kind, 0});
      check({140, 60000, 60000, 4, 8, pool, mode, kind, 0});
    }
  }
}

namespace {

/// A launch on inputs of its own.
struct Launch {
  int32_t rows, columns;
  DeviceArray<float> scores;
  DeviceArray<int32_t> length, keep, index, start;

  Launch(int32_t rows_, int32_t columns_, uint32_t seed)
      : rows(rows_),
        columns(columns_),
        scores(make(rows_, columns_, seed)),
        length(std::vector<int32_t>(rows_, columns_)),
        keep(std::vector<int32_t>(rows_, columns_ / 20)),
        index(static_cast<size_t>(rows_) * (columns_ / 20)),
        start(rows_ + 1) {}
  static std::vector<float> make(int32_t rows, int32_t columns, uint32_t seed) {
    std::mt19937 random(seed);
    return make_scores({rows, columns, columns, 0, 8, 7, Pool::max, 0, 0}, random);
  }
  void launch(cudaStream_t stream) {
    const kernels::SelectTokensParams params{scores.data(),
                                             length.data(),
                                             keep.data(),
                                             index.data(),
                                             start.data(),
                                             columns,
                                             rows,
                                             columns,
                                             rows * (columns / 20),
                                             0,
                                             8,
                                             7,
                                             Pool::max};
    cuda_ok(kernels::select_tokens(params, nullptr, stream));
  }
  Bytes results() const { return contents(index, start); }
  void poison() {
    index.fill(0x7b);
    start.fill(0x7b);
  }
};

}  // namespace

TEST_CASE("every launch gives what the first one gave, on three streams at once", "[select_tokens][large]") {
  Launch a(8, 32768, 1), b(300, 1000, 2), c(40, 5000, 3);
  for (Launch* x : {&a, &b, &c}) require_repeats(*x, 10000, 100);
  require_apart(100, 100, a, b, c);
}

TEST_CASE("a captured launch follows lengths that change", "[select_tokens][large]") {
  for (const int32_t rows : {8, 300}) {
    Launch call(rows, 4000, 4);
    std::mt19937 random(5);
    require_graph_follows(call, 20, [&](int) {
      std::vector<int32_t> length(rows), keep(rows);
      for (int32_t r = 0; r < rows; ++r) {
        length[r] = static_cast<int32_t>(random() % 4001);
        keep[r] = static_cast<int32_t>(random() % 200);
      }
      call.length.assign(length);
      call.keep.assign(keep);
    });
  }
}

TEST_CASE("a total below the sum cuts the last rows, one above it leaves a tail of -1", "[select_tokens]") {
  for (const int32_t cut : {-5000, 1, 900}) {
    check({2, 16000, 16000, 4, 32, 1, Pool::max, 0, cut});
    check({20, 1500, 1500, 4, 32, 1, Pool::max, 2, cut});
  }
  for (const int32_t cut : {-1, 900}) check({260, 300, 300, 4, 8, 1, Pool::max, 0, cut});
}

TEST_CASE("a total off the sum of many rows", "[select_tokens][large]") {
  for (const int32_t cut : {-5000, -1, 1, 17, 900}) {
    check({8, 16000, 16000, 4, 32, 7, Pool::max, 0, cut});
    check({20, 1500, 1500, 4, 32, 7, Pool::max, 2, cut});
    check({600, 300, 300, 4, 8, 7, Pool::max, 0, cut});
  }
}

TEST_CASE("no row and no column still write row_start", "[select_tokens]") {
  DeviceArray<int32_t> none(size_t{0}), zeros(std::vector<int32_t>{0, 5}), start(3);
  DeviceArray<float> scores(size_t{0});
  kernels::SelectTokensParams params{
      scores.data(), zeros.data(), zeros.data(), none.data(), start.data(), 0, 0, 0, 0, 0, 0, 1, Pool::max};
  cuda_ok(kernels::select_tokens(params, nullptr, nullptr));
  REQUIRE(start.host()[0] == 0);
  params.num_rows = 2;
  cuda_ok(kernels::select_tokens(params, nullptr, nullptr));
  REQUIRE(start.host() == std::vector<int32_t>{0, 0, 0});
  REQUIRE(start.guards_intact());
}
