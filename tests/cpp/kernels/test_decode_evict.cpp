// SPDX-License-Identifier: Apache-2.0
// The launches against plain loops: the votes of every slot, who leaves, what is overwritten and what is not, for rows
// of one slice and of many, below their room and full, with guard bands and repeated bits.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/eviction.h"
#include "core/votes.h"
#include "support/catch.hpp"
#include "support/evict_device.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

/// Softmax weights [K + 1, g], out [g, Dv] and lse [g] of a row.
struct Attention {
  std::vector<double> weight, out, lse;
};

Attention attend(const EvictProblem& p, const EvictInput& in, int32_t r) {
  const int32_t rows_per_sequence = static_cast<int32_t>(p.len.size()) / p.batch, len = p.len[r];
  const int64_t kv_head =
      int64_t{r / rows_per_sequence} * p.num_kv_heads + r % rows_per_sequence / (rows_per_sequence / p.num_kv_heads);
  Attention a{std::vector<double>(int64_t{len + 1} * p.group), std::vector<double>(p.group * p.value_dim), {}};
  const double scale = 1.0 / std::sqrt(p.key_dim);
  for (int32_t h = 0; h < p.group; ++h) {
    double top = -1e300, sum = 0;
    for (int32_t j = 0; j <= len; ++j) {
      const float* key = j < len ? &in.key[(int64_t{in.start[r]} + j) * p.key_dim] : &in.new_key[kv_head * p.key_dim];
      double dot = 0;
      for (int32_t d = 0; d < p.key_dim; ++d) dot += in.query[(int64_t{r} * p.group + h) * p.key_dim + d] * key[d];
      a.weight[int64_t{j} * p.group + h] = dot * scale;
      top = std::max(top, dot * scale);
    }
    for (int32_t j = 0; j <= len; ++j) sum += std::exp(a.weight[int64_t{j} * p.group + h] - top);
    a.lse.push_back(top + std::log(sum));
    for (int32_t j = 0; j <= len; ++j) {
      double& w = a.weight[int64_t{j} * p.group + h];
      w = std::exp(w - a.lse[h]);
      const float* value =
          j < len ? &in.value[(int64_t{in.start[r]} + j) * p.value_dim] : &in.new_value[kv_head * p.value_dim];
      for (int32_t d = 0; d < p.value_dim; ++d) a.out[h * p.value_dim + d] += w * value[d];
    }
  }
  return a;
}

double reduced(const EvictProblem& p, const Attention& a, int32_t token) {
  double all = 0;
  for (int32_t h = 0; h < p.group; ++h) {
    const double w = a.weight[int64_t{token} * p.group + h];
    all = p.reduce == Reduce::max ? std::max(all, w) : all + w / p.group;
  }
  return all;
}

void check_row(const EvictProblem& p, const EvictInput& in, const EvictOutput& got, int32_t r) {
  CAPTURE(r, p.len[r], p.room[r], p.group, static_cast<int>(p.dtype));
  const int64_t start = in.start[r], slots = in.start.back();
  const int32_t len = p.len[r], room = p.room[r], bits = vote_scale_bits(p.vote_window);
  const double one = std::ldexp(1.0, bits), tolerance = 1e-5 * one + 1;
  if (room == 0) {
    for (int32_t h = 0; h < p.group; ++h) {
      REQUIRE(got.lse[int64_t{r} * p.group + h] == -std::numeric_limits<float>::infinity());
      REQUIRE(got.out[(int64_t{r} * p.group + h) * p.value_dim] == 0.0f);
    }
    return;
  }
  const Attention a = attend(p, in, r);
  double off = 0, norm = 0;
  for (int32_t h = 0; h < p.group; ++h) {
    REQUIRE(std::abs(got.lse[int64_t{r} * p.group + h] - a.lse[h]) < 1e-4);
    for (int32_t d = 0; d < p.value_dim; ++d) {
      const double want = a.out[h * p.value_dim + d], x = got.out[(int64_t{r} * p.group + h) * p.value_dim + d];
      off += (x - want) * (x - want);
      norm += want * want;
    }
  }
  REQUIRE(std::sqrt(off) <= (p.dtype == DType::float32 ? 1e-5 : 1e-2) * std::sqrt(norm));

  const bool full = len == room;
  const int32_t slot = full ? got.state.order[start + len - 1] : len;
  REQUIRE(got.state.row_len[r] == (full ? len : len + 1));
  REQUIRE(got.state.vote_step[r] == (in.state.vote_step[r] + 1) % p.vote_window);
  // Every vote of the oldest ring row is replaced; the new token's slot holds its own vote alone.
  for (int32_t j = 0; j < got.state.row_len[r]; ++j) {
    int32_t sum = 0;
    for (int32_t w = 0; w < p.vote_window; ++w) {
      const int32_t vote = got.state.votes[w * slots + start + j];
      sum += vote;
      if (w == in.state.vote_step[r]) {
        const double want = reduced(p, a, j == slot ? len : j) * one;
        if (!(std::abs(vote - want) <= tolerance)) FAIL("vote of slot " << j << ": " << vote << " for " << want);
      } else if (vote != (j == slot ? 0 : in.state.votes[w * slots + start + j])) {
        FAIL("ring row " << w << " of slot " << j << " changed");
      }
    }
    if (sum != got.state.vote_sum[start + j]) FAIL("vote_sum of slot " << j);
  }

  std::vector<int32_t> order(in.state.order.begin() + start, in.state.order.begin() + start + len);
  if (full) {
    const EvictStep step = evict_step(len, room, p.window, p.sink);
    const int32_t place = static_cast<int32_t>(std::find(order.begin(), order.end(), slot) - order.begin());
    const auto pooled = [&](int32_t i) {
      double score = 0;
      for (int32_t k = step.pool_begin(i, p.pool / 2); k < step.pool_end(i, p.pool / 2); ++k) {
        const int64_t s = start + order[k];
        const double sum =
            in.state.vote_sum[s] - in.state.votes[in.state.vote_step[r] * slots + s] + reduced(p, a, order[k]) * one;
        score = p.mode == Pool::max ? std::max(score, sum) : score + sum;
      }
      return score;
    };
    REQUIRE(place >= step.first);
    REQUIRE(place < step.candidates);
    double least = 1e300;
    for (int32_t i = step.first; i < step.candidates; ++i) least = std::min(least, pooled(i));
    REQUIRE(pooled(place) <= least + 2 * p.pool * tolerance);
    order.erase(order.begin() + place);
  }
  order.push_back(slot);
  REQUIRE(std::equal(order.begin(), order.end(), got.state.order.begin() + start));

  // K, V and positions: the new token in its slot, everything else as it was, dead slots included.
  const int32_t rows_per_sequence = static_cast<int32_t>(p.len.size()) / p.batch, b = r / rows_per_sequence;
  const int64_t kv_head = int64_t{b} * p.num_kv_heads + r % rows_per_sequence / (rows_per_sequence / p.num_kv_heads);
  const auto check_rows = [&](const std::vector<unsigned char>& now, const std::vector<unsigned char>& before,
                              const std::vector<float>& fresh, int64_t dim) {
    const int64_t bytes = dim * dtype_bytes(p.dtype);
    const std::vector<unsigned char> token =
        encoded(std::vector<float>(fresh.begin() + kv_head * dim, fresh.begin() + (kv_head + 1) * dim), p.dtype);
    for (int64_t s = 0; s < room; ++s) {
      const auto want = s == slot ? token.begin() : before.begin() + (start + s) * bytes;
      if (!std::equal(want, want + bytes, now.begin() + (start + s) * bytes)) FAIL("channels of slot " << s);
    }
  };
  check_rows(got.state.key, in.state.key, in.new_key, p.key_dim);
  check_rows(got.state.value, in.state.value, in.new_value, p.value_dim);
  for (int32_t s = 0; s < room; ++s) {
    if (got.state.position[start + s] != (s == slot ? in.new_position[b] : in.state.position[start + s])) {
      FAIL("position of slot " << s);
    }
  }
}

void check(const EvictProblem& p) {
  const EvictInput in(p);
  const EvictOutput got = run(p, in), again = run(p, in);
  for (int32_t r = 0; r < static_cast<int32_t>(p.len.size()); ++r) check_row(p, in, got, r);
  require_same(got, again);
}

}  // namespace

TEST_CASE("rows around slice borders, full, growing, empty and without room", "[decode_evict][cluster16]") {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    check({.len = {3, 15, 16, 17, 63, 64, 65, 129, 0, 0, 7, 200},
           .room = {3, 15, 17, 17, 63, 64, 66, 129, 4, 0, 9, 200},
           .batch = 3,
           .num_kv_heads = 2,
           .dtype = dtype});
  }
}

TEST_CASE("rows of many slices, with votes in a launch of their own and without", "[decode_evict][cluster16]") {
  check({.len = {8300, 8200}, .room = {8300, 8201}, .pool = 129, .mode = Pool::avg});
  check({.len = {1100, 2100, 1300}, .room = {1100, 2100, 1300}, .window = 8, .pool = 7});
}

TEST_CASE("long rows", "[decode_evict][large]") {
  for (const Pool mode : {Pool::max, Pool::avg}) {
    // Two rounds of places for each block of a cluster.
    check({.len = {70000}, .room = {70000}, .group = 1, .pool = 7, .mode = mode});
    check({.len = {20000, 9001}, .room = {20000, 9002}, .pool = 129, .mode = mode});
    check({.len = {4097, 8192, 5000}, .room = {4097, 8192, 5000}, .window = 8, .pool = 7, .mode = mode});
  }
}

TEST_CASE("every tile and reduction", "[decode_evict][cluster16]") {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const int32_t group : {8, 9}) {
      check({.len = {70, 20}, .room = {70, 21}, .group = group, .reduce = Reduce::max, .dtype = dtype});
      for (const int32_t dim : {128, 256}) {
        check({.len = {70}, .room = {70}, .group = group, .key_dim = dim, .value_dim = dim - 40, .dtype = dtype});
      }
    }
  }
}

TEST_CASE("groups and head dims", "[decode_evict][large]") {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const int32_t group : {1, 3, 7, 8, 9, 16}) {
      check({.len = {150, 90}, .room = {150, 90}, .group = group, .reduce = Reduce::max, .dtype = dtype});
    }
    for (const int32_t dim : {8, 80, 96, 128, 256}) {
      check({.len = {150, 90}, .room = {150, 99}, .key_dim = dim, .value_dim = 264 - dim, .dtype = dtype});
    }
  }
}

// On 132 multiprocessors 264 blocks are in flight: clusters of 16, 8, 4 and 2 blocks a row, then one block a row. Where
// no cluster does the row, 320 rows get up to three slices each, 560 one.
TEST_CASE("sixteen blocks a row", "[decode_evict][cluster16]") { check(many_rows(16, 40)); }

TEST_CASE("every other number of blocks a row", "[decode_evict]") {
  for (const size_t rows : {24, 56, 104}) check(many_rows(rows, 40));
  check(many_rows(320, 12));
  check(many_rows(560, 20));
}

// A cluster of 16 has slices of 16 slots up to 256 tokens, then of 32.
TEST_CASE("rows around the borders of a cluster's slices", "[decode_evict][cluster16]") {
  for (const Pool mode : {Pool::max, Pool::avg}) {
    for (const int32_t pool : {1, 3, 129}) {
      check({.len = {255, 256, 257, 16, 512, 513},
             .room = {255, 256, 257, 16, 512, 514},
             .pool = pool,
             .mode = mode,
             .dtype = DType::bfloat16});
    }
  }
}

TEST_CASE("rows too long for the shared memory of their blocks", "[decode_evict][large]") {
  for (const Pool mode : {Pool::max, Pool::avg}) {
    // 16 blocks: 3750 slots each, of 8 heads.
    check({.len = {60000, 100, 90, 80, 70, 60, 50, 40},
           .room = {60000, 100, 91, 80, 70, 60, 50, 40},
           .group = 8,
           .pool = 7,
           .mode = mode});
    // One block a row.
    EvictProblem p = many_rows(304, 12);
    p.len[5] = p.room[5] = 9000;
    p.pool = mode == Pool::max ? 129 : 7;
    p.mode = mode;
    check(p);
  }
}

TEST_CASE("more rows than blocks in flight", "[decode_evict][large]") { check(many_rows(2400, 92)); }
