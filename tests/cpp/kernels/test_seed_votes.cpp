// SPDX-License-Identifier: Apache-2.0
// The launch itself against plain loops: every tile and packing, dead slots, guard bands, repeated bits.
#include "kernels/window_scores/seed_votes.h"

#include <cmath>
#include <random>

#include "core/votes.h"
#include "support/catch.hpp"
#include "support/device.hpp"
#include "support/half.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

struct Problem {
  std::vector<int32_t> len;
  int32_t rows_per_sequence = 2, group = 2, window = 8, vote_window = 8, dim = 64;
  Reduce reduce_group = Reduce::mean;
  DType dtype = DType::float16;
  int32_t spare = 5;
};

constexpr int32_t kUntouched = -7;

void run(const Problem& p) {
  CAPTURE(p.group, p.window, p.vote_window, p.dim, static_cast<int>(p.dtype), static_cast<int>(p.reduce_group));
  const int32_t rows = static_cast<int32_t>(p.len.size()), batch = rows / p.rows_per_sequence;
  const int32_t heads = p.rows_per_sequence * p.group, bits = vote_scale_bits(p.vote_window);
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.dim));
  std::vector<int32_t> start{3};  // the first slots belong to no row
  for (const int32_t n : p.len) start.push_back(start.back() + n + p.spare);
  const int64_t slots = start.back() + 2;
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  std::vector<float> query(static_cast<size_t>(batch) * heads * p.window * p.dim), key(slots * p.dim, std::nanf(""));
  std::vector<float> lse(static_cast<size_t>(batch) * heads * p.window);
  std::vector<int32_t> position(slots, 2147483647), query_position;
  for (float& x : query) x = rounded(normal(random), p.dtype);
  for (float& x : lse) x = 3.0f + std::abs(normal(random));
  int32_t longest = 0;
  for (int32_t r = 0; r < rows; ++r) {
    longest = std::max(longest, p.len[r]);
    for (int32_t s = 0; s < p.len[r]; ++s) {
      position[start[r] + s] = 2 * s;
      for (int32_t d = 0; d < p.dim; ++d) key[(int64_t{start[r]} + s) * p.dim + d] = rounded(normal(random), p.dtype);
    }
  }
  for (int32_t b = 0; b < batch; ++b) {
    for (int32_t i = 0; i < p.window; ++i) query_position.push_back(i < b ? -1 : longest + i);
  }

  DeviceArray<unsigned char> q(encoded(query, p.dtype)), k(encoded(key, p.dtype));
  DeviceArray<float> l(lse);
  DeviceArray<int32_t> at(query_position), positions(position), starts(start), lens(p.len);
  DeviceArray<int32_t> votes(std::vector<int32_t>(p.vote_window * slots, kUntouched));
  DeviceArray<int32_t> sum(std::vector<int32_t>(slots, kUntouched)), order(std::vector<int32_t>(slots, kUntouched));
  DeviceArray<int32_t> step(std::vector<int32_t>(rows, kUntouched));
  kernels::SeedVotesParams params{};
  params.query = q.data();
  params.lse = l.data();
  params.query_position = at.data();
  params.key = k.data();
  params.slot_position = positions.data();
  params.rows.arena = {starts.data(), lens.data(), slots, rows};
  params.rows.rows_per_sequence = p.rows_per_sequence;
  params.query_stride = {int64_t{heads} * p.window * p.dim, int64_t{p.window} * p.dim, p.dim};
  params.key_stride = p.dim;
  params.votes = votes.data();
  params.vote_sum = sum.data();
  params.vote_step = step.data();
  params.order = order.data();
  params.num_q_heads = heads;
  params.window = p.window;
  params.vote_window = p.vote_window;
  params.head_dim = p.dim;
  params.num_rows = rows;
  params.group_size = p.group;
  params.scale = scale;
  params.reduce_group = p.reduce_group;
  params.dtype = p.dtype;
  cuda_ok(kernels::seed_votes(params, nullptr));
  const std::vector<int32_t> got = votes.host(), got_sum = sum.host(), got_order = order.host();
  for (const auto* array : {&votes, &sum, &order, &step}) REQUIRE(array->guards_intact());
  REQUIRE(step.host() == std::vector<int32_t>(rows, 0));
  cuda_ok(kernels::seed_votes(params, nullptr));
  REQUIRE(votes.host() == got);
  REQUIRE(sum.host() == got_sum);

  std::vector<int32_t> want_order(slots, kUntouched);
  for (int64_t s = 0; s < slots; ++s) {
    int32_t r = 0;
    while (r < rows && s >= start[r + 1]) ++r;
    if (s < start[0] || r == rows) {  // no row's slot
      if (got_sum[s] != kUntouched) FAIL("sum of a foreign slot " << s);
      for (int32_t v = 0; v < p.vote_window; ++v) {
        if (got[v * slots + s] != kUntouched) FAIL("vote of a foreign slot " << s);
      }
      continue;
    }
    const int32_t i = static_cast<int32_t>(s) - start[r], b = r / p.rows_per_sequence;
    const bool live = i < p.len[r];
    want_order[s] = live ? i : 0;
    int32_t total = 0;
    for (int32_t v = 0; v < p.vote_window; ++v) {
      const int32_t w = p.window - p.vote_window + v, newest = query_position[b * p.window + w];
      double weight = 0;
      for (int32_t h = 0; h < p.group && live && newest >= 0 && position[s] <= newest; ++h) {
        const int64_t of_query = (int64_t{r} * p.group + h) * p.window + w;
        double dot = 0;
        for (int32_t d = 0; d < p.dim; ++d) dot += double{query[of_query * p.dim + d]} * key[s * p.dim + d];
        const double of_head = std::exp(dot * scale - lse[of_query]);
        weight = p.reduce_group == Reduce::max ? std::max(weight, of_head) : weight + of_head / p.group;
      }
      const double vote = got[v * slots + s] / std::ldexp(1.0, bits);
      total += got[v * slots + s];
      weight = std::min(weight, 1.0);
      if (!(std::abs(vote - weight) <= 2e-5 * (1 + weight))) {
        FAIL("vote " << v << " of slot " << s << " in row " << r << ": " << vote << " for " << weight);
      }
      if (!live && got[v * slots + s] != 0) FAIL("vote of dead slot " << s);
    }
    if (got_sum[s] != total) FAIL("sum of slot " << s << ": " << got_sum[s] << " for " << total);
  }
  REQUIRE(got_order == want_order);
}

}  // namespace

TEST_CASE("votes of every head dim and dtype", "[seed_votes]") {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const int32_t dim : {8, 64, 80, 128, 200, 256}) run({.len = {300, 40}, .dim = dim, .dtype = dtype});
  }
}

TEST_CASE("votes of every packing of heads and queries", "[seed_votes]") {
  for (const Reduce reduce : {Reduce::mean, Reduce::max}) {
    for (const int32_t window : {1, 7, 8, 33, 64}) {
      for (const int32_t group : {1, 3, 7, 16}) {
        run({.len = {150, 9}, .group = group, .window = 64, .vote_window = window, .reduce_group = reduce});
      }
    }
    run({.len = {150, 9}, .group = 16, .window = 64, .vote_window = 64, .dim = 256, .reduce_group = reduce});
  }
}

TEST_CASE("votes of rows of all lengths", "[seed_votes]") {
  run({.len = {0, 1, 700, 40, 5, 4000}});
  run({.len = {0, 0}});
  run({.len = {127, 128, 129, 31, 32, 33}, .group = 4, .dim = 128, .spare = 0});
  run({.len = std::vector<int32_t>(96, 77), .dtype = DType::bfloat16, .spare = 500});
}
