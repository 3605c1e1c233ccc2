// SPDX-License-Identifier: Apache-2.0
// The launches themselves against a plain loop: block borders, skewed rows, group sizes, every tile, guard bands,
// repeated bits.
#include "kernels/decode_attention/decode_attention.h"

#include <cmath>

#include "support/attention.hpp"
#include "support/device.hpp"

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
  const PackedRows packed(p.len, p.spare, p.key_dim, p.value_dim, p.dtype);
  const std::vector<float> query = random_numbers(static_cast<size_t>(rows) * p.group * p.key_dim, p.dtype, 1);

  const int32_t bytes = dtype_bytes(p.dtype);
  DeviceArray<unsigned char> q(encoded(query, p.dtype)), k(encoded(packed.key, p.dtype)),
      v(encoded(packed.value, p.dtype));
  DeviceArray<unsigned char> out(static_cast<size_t>(rows) * p.group * p.value_dim * bytes);
  DeviceArray<float> lse(static_cast<size_t>(rows) * p.group);
  DeviceArray<int32_t> starts(packed.start), lens(p.len);
  const int32_t per_sequence = rows / p.batch;
  kernels::DecodeAttentionParams params{};
  params.query = q.data();
  params.query_batch_stride = int64_t{per_sequence} * p.group * p.key_dim;
  params.query_head_stride = p.key_dim;
  params.key_rows = k.data();
  params.value_rows = v.data();
  params.rows = {starts.data(), lens.data(), packed.slots, rows};
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

  AttentionOracle oracle(p.key_dim, p.value_dim, scale, p.dtype);
  for (size_t i = 0; i < got_lse.size(); ++i) {
    const int32_t r = static_cast<int32_t>(i) / p.group;
    oracle.begin(&query[i * p.key_dim]);
    oracle.see_row(packed, r, p.len[r]);
    oracle.compare(&got[i * p.value_dim], got_lse[i], i);
  }
  oracle.check_all();
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
