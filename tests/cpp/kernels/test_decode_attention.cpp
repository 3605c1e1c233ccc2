// SPDX-License-Identifier: Apache-2.0
// The launches themselves against a plain loop: block borders, skewed rows, group sizes, every tile, guard bands,
// repeated bits.
#include "kernels/decode_attention/decode_attention.h"

#include <cmath>
#include <limits>
#include <random>

#include "support/catch.hpp"
#include "support/device.hpp"
#include "support/half.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

struct Problem {
  std::vector<int32_t> len;
  int32_t batch = 1, group = 4, key_dim = 64, value_dim = 64, spare = 3;
  DType dtype = DType::float16;
};

void run(const Problem& p) {
  CAPTURE(p.group, p.key_dim, p.value_dim, static_cast<int>(p.dtype), p.len.size());
  const int32_t rows = static_cast<int32_t>(p.len.size());
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.key_dim));
  std::vector<int32_t> start{0};
  for (const int32_t n : p.len) start.push_back(start.back() + n + p.spare);
  const int64_t slots = start.back();
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  std::vector<float> query(static_cast<size_t>(rows) * p.group * p.key_dim), key(slots * p.key_dim),
      value(slots * p.value_dim);
  for (std::vector<float>* v : {&query, &key, &value}) {
    for (float& x : *v) x = rounded(normal(random), p.dtype);
  }
  for (int32_t r = 0; r < rows; ++r) {  // dead slots are NaN
    for (int64_t s = start[r] + p.len[r]; s < start[r + 1]; ++s) {
      for (int32_t d = 0; d < p.key_dim; ++d) key[s * p.key_dim + d] = std::nanf("");
      for (int32_t d = 0; d < p.value_dim; ++d) value[s * p.value_dim + d] = std::nanf("");
    }
  }

  const int32_t bytes = dtype_bytes(p.dtype);
  DeviceArray<unsigned char> q(encoded(query, p.dtype)), k(encoded(key, p.dtype)), v(encoded(value, p.dtype));
  DeviceArray<unsigned char> out(static_cast<size_t>(rows) * p.group * p.value_dim * bytes);
  DeviceArray<float> lse(static_cast<size_t>(rows) * p.group);
  DeviceArray<int32_t> starts(start), lens(p.len);
  const int32_t per_sequence = rows / p.batch;
  kernels::DecodeAttentionParams params{};
  params.query = q.data();
  params.query_batch_stride = int64_t{per_sequence} * p.group * p.key_dim;
  params.query_head_stride = p.key_dim;
  params.key_rows = k.data();
  params.value_rows = v.data();
  params.rows = {starts.data(), lens.data(), slots, rows};
  params.out = out.data();
  params.lse = lse.data();
  params.rows_per_sequence = per_sequence;
  params.group_size = p.group;
  params.key_dim = p.key_dim;
  params.value_dim = p.value_dim;
  params.scale = scale;
  params.dtype = p.dtype;
  int64_t work_bytes = 0;
  cuda_ok(kernels::decode_attention_workspace_bytes(params, &work_bytes));
  DeviceArray<unsigned char> work(static_cast<size_t>(work_bytes));
  cuda_ok(kernels::decode_attention(params, work.data(), nullptr));
  const std::vector<unsigned char> first_out = out.host();
  const std::vector<float> got = decoded(first_out, p.dtype), got_lse = lse.host();
  REQUIRE(out.guards_intact());
  REQUIRE(lse.guards_intact());
  REQUIRE(work.guards_intact());
  cuda_ok(kernels::decode_attention(params, work.data(), nullptr));
  REQUIRE(out.host() == first_out);
  REQUIRE(lse.host() == got_lse);

  double off = 0, norm = 0;
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t h = 0; h < p.group; ++h) {
      const int64_t head = int64_t{r} * p.group + h;
      const int32_t n = p.len[r];
      std::vector<double> logit(n), want(p.value_dim);
      double top = -std::numeric_limits<double>::infinity(), sum = 0;
      for (int32_t s = 0; s < n; ++s) {
        for (int32_t d = 0; d < p.key_dim; ++d) {
          logit[s] += double{scale} * query[head * p.key_dim + d] * key[(start[r] + s) * int64_t{p.key_dim} + d];
        }
        top = std::max(top, logit[s]);
      }
      for (int32_t s = 0; s < n; ++s) {
        const double weight = std::exp(logit[s] - top);
        sum += weight;
        for (int32_t d = 0; d < p.value_dim; ++d) want[d] += weight * value[(start[r] + s) * int64_t{p.value_dim} + d];
      }
      if (n == 0) {
        if (got_lse[head] != -std::numeric_limits<float>::infinity()) FAIL("lse of empty row " << r);
      } else if (!(std::abs(got_lse[head] - (top + std::log(sum))) < 1e-4)) {
        FAIL("lse of row " << r << " head " << h << ": " << got_lse[head] << " for " << top + std::log(sum));
      }
      double row_off = 0, row_norm = 0;
      for (int32_t d = 0; d < p.value_dim; ++d) {
        const double x = got[head * p.value_dim + d], y = n == 0 ? 0 : want[d] / sum;
        row_off += (x - y) * (x - y);
        row_norm += y * y;
      }
      if (!(row_off <= 4e-4 * row_norm))
        FAIL("row " << r << " head " << h << " off by " << std::sqrt(row_off / row_norm));
      off += row_off;
      norm += row_norm;
    }
  }
  const double bound = p.dtype == DType::float32 ? 1e-5 : p.dtype == DType::float16 ? 2e-3 : 1e-2;
  REQUIRE(std::sqrt(off) <= bound * std::sqrt(norm));
}

}  // namespace

TEST_CASE("block borders, empty rows and skew", "[decode_attention]") {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    run({.len = {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300}, .batch = 3, .dtype = dtype});
    run({.len = {1, 20000, 1, 0, 2, 700}, .batch = 2, .dtype = dtype});
    run({.len = {0, 0}, .dtype = dtype});
  }
}

TEST_CASE("every tile and unequal head dims", "[decode_attention]") {
  const std::vector<std::pair<int32_t, int32_t>> dims = {{8, 8},     {64, 32},  {80, 80},   {96, 128},
                                                         {128, 128}, {40, 200}, {256, 256}, {256, 16}};
  for (const auto& [key_dim, value_dim] : dims) {
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
      run({.len = {70, 1000}, .group = 4, .key_dim = key_dim, .value_dim = value_dim, .dtype = dtype});
      run({.len = {70, 1000}, .group = 13, .key_dim = key_dim, .value_dim = value_dim, .dtype = dtype});
    }
  }
}

TEST_CASE("group sizes 1 to 16", "[decode_attention]") {
  for (int32_t group = 1; group <= 16; ++group)
    run({.len = {5, 400, 33, 1}, .batch = 2, .group = group, .key_dim = 128, .value_dim = 128});
}

TEST_CASE("one row of many slots and many rows of few", "[decode_attention]") {
  run({.len = {1000000}, .group = 2, .key_dim = 64, .value_dim = 64, .spare = 0});
  std::vector<int32_t> lengths(4096);
  for (size_t i = 0; i < lengths.size(); ++i) lengths[i] = static_cast<int32_t>(i * 37 % 150);
  run({.len = lengths, .batch = 512, .group = 2});
}
