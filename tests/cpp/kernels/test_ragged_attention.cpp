// SPDX-License-Identifier: Apache-2.0
// The launches themselves against a plain loop: tile borders, causal diagonals, padding, parts, guard bands, repeated
// bits.
#include "kernels/ragged_attention/ragged_attention.h"

#include <cmath>
#include <limits>

#include "support/attention.hpp"
#include "support/device.hpp"

using namespace uncomp;
using namespace uncomp::test;

namespace {

enum class New { none, keys, other };

struct Problem {
  std::vector<int32_t> len;
  int32_t batch = 1, group = 4, tokens = 5, key_dim = 64, value_dim = 64;
  New fresh = New::none;
  std::vector<int32_t> first = {}, length = {};
  DType dtype = DType::float16;
};

void run(const Problem& p) {
  CAPTURE(p.group, p.tokens, p.key_dim, p.value_dim, static_cast<int>(p.dtype), static_cast<int>(p.fresh));
  const int32_t rows = static_cast<int32_t>(p.len.size()), per_sequence = rows / p.batch, spare = 2;
  const size_t queries = static_cast<size_t>(rows) * p.group * p.tokens,
               new_tokens = static_cast<size_t>(rows) * p.tokens;
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.key_dim));
  const PackedRows packed(p.len, spare, p.key_dim, p.value_dim, p.dtype);
  const std::vector<float> query = random_numbers(queries * p.key_dim, p.dtype, 1);
  const std::vector<float> new_key = random_numbers(new_tokens * p.key_dim, p.dtype, 4);
  const std::vector<float> new_value = random_numbers(new_tokens * p.value_dim, p.dtype, 5);
  const std::vector<float> other = random_numbers(queries * p.value_dim, p.dtype, 6);
  std::vector<float> other_lse = random_numbers(queries, DType::float32, 7);
  for (size_t i = 0; i < queries; i += 3) other_lse[i] = -std::numeric_limits<float>::infinity();

  DeviceArray<unsigned char> q(encoded(query, p.dtype)), k(encoded(packed.key, p.dtype)),
      v(encoded(packed.value, p.dtype)), nk(encoded(new_key, p.dtype)), nv(encoded(new_value, p.dtype)),
      oo(encoded(other, p.dtype));
  DeviceArray<float> ol(other_lse), lse(queries);
  DeviceArray<unsigned char> out(queries * p.value_dim * dtype_bytes(p.dtype));
  DeviceArray<int32_t> starts(packed.start), lens(p.len), firsts(p.first), lengths(p.length);
  const auto strides = [&](int32_t heads, int32_t dim) {
    return Strides3{int64_t{heads} * p.tokens * dim, int64_t{p.tokens} * dim, dim};
  };
  kernels::RaggedAttentionParams params{};
  params.query = q.data();
  params.query_strides = strides(per_sequence * p.group, p.key_dim);
  params.rows_per_kv_head = 1;
  if (p.fresh == New::keys) {
    params.key = nk.data();
    params.value = nv.data();
    params.key_strides = strides(per_sequence, p.key_dim);
    params.value_strides = strides(per_sequence, p.value_dim);
  }
  if (p.fresh == New::other) {
    params.other_out = oo.data();
    params.other_lse = ol.data();
    params.other_out_strides = strides(per_sequence * p.group, p.value_dim);
    params.other_lse_strides = strides(per_sequence * p.group, 1);
  }
  params.tokens = {p.first.empty() ? nullptr : firsts.data(), p.length.empty() ? nullptr : lengths.data(), p.tokens};
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
  cuda_ok(kernels::ragged_attention_workspace_bytes(params, &work_bytes));
  DeviceArray<unsigned char> work(static_cast<size_t>(work_bytes));
  cuda_ok(kernels::ragged_attention(params, work.data(), nullptr));
  const std::vector<unsigned char> first_out = out.host();
  const std::vector<float> got = decoded(first_out, p.dtype), got_lse = lse.host();
  REQUIRE(out.guards_intact());
  REQUIRE(lse.guards_intact());
  REQUIRE(work.guards_intact());
  cuda_ok(kernels::ragged_attention(params, work.data(), nullptr));
  REQUIRE(out.host() == first_out);
  REQUIRE(lse.host() == got_lse);

  AttentionOracle oracle(p.key_dim, p.value_dim, scale, p.dtype);
  for (size_t i = 0; i < queries; ++i) {
    const int32_t t = static_cast<int32_t>(i % p.tokens), r = static_cast<int32_t>(i / p.tokens / p.group),
                  b = r / per_sequence;
    const int32_t first = p.first.empty() ? 0 : p.first[b];
    const int32_t count = p.length.empty() ? p.tokens - first : p.length[b];
    oracle.begin(&query[i * p.key_dim]);
    if (t >= first && t < first + count) {
      oracle.see_row(packed, r, p.len[r]);
      if (p.fresh == New::keys) {
        for (int32_t j = first; j <= t; ++j) {
          const size_t at = static_cast<size_t>(r) * p.tokens + j;
          oracle.see(&new_key[at * p.key_dim], &new_value[at * p.value_dim]);
        }
      }
      if (p.fresh == New::other && !std::isinf(other_lse[i])) oracle.add(other_lse[i], &other[i * p.value_dim]);
    }
    oracle.compare(&got[i * p.value_dim], got_lse[i], i);
  }
  oracle.check_all();
}

constexpr DType kDTypes[] = {DType::float32, DType::float16, DType::bfloat16};
constexpr New kNews[] = {New::none, New::keys, New::other};

}  // namespace

TEST_CASE("past lengths and token counts around tile borders", "[ragged_attention]") {
  for (const DType dtype : kDTypes) {
    for (const New fresh : kNews) {
      for (const int32_t tokens : {1, 15, 16, 17, 65}) {
        run({.len = {0, 1, 63, 64, 65, 200}, .batch = 3, .tokens = tokens, .fresh = fresh, .dtype = dtype});
      }
    }
  }
}

TEST_CASE("padding on both sides, an empty and a full sequence", "[ragged_attention]") {
  for (const DType dtype : kDTypes) {
    for (const New fresh : kNews) {
      run({.len = {10, 300, 0, 70, 5, 5, 64, 1},
           .batch = 4,
           .group = 3,
           .tokens = 70,
           .fresh = fresh,
           .first = {0, 30, 70, 69},
           .length = {70, 20, 0, 1},
           .dtype = dtype});
    }
  }
}

TEST_CASE("every tile, unequal head dims and group sizes", "[ragged_attention]") {
  const std::vector<std::pair<int32_t, int32_t>> dims = {{8, 8},     {80, 80},  {96, 128},
                                                         {128, 128}, {40, 200}, {256, 256}};
  for (const auto& [key_dim, value_dim] : dims) {
    for (const DType dtype : kDTypes) {
      for (const int32_t group : {1, 7, 16}) {
        run({.len = {70, 130},
             .group = group,
             .tokens = 20,
             .key_dim = key_dim,
             .value_dim = value_dim,
             .fresh = New::keys,
             .dtype = dtype});
      }
    }
  }
}

TEST_CASE("few tokens over long rows are cut into parts", "[ragged_attention]") {
  for (const New fresh : kNews) {
    run({.len = {20000, 3, 0, 9000}, .group = 4, .tokens = 3, .key_dim = 128, .value_dim = 128, .fresh = fresh});
    run({.len = {20000, 3, 0, 9000},
         .batch = 2,
         .tokens = 9,
         .fresh = fresh,
         .first = {4, 9},
         .length = {5, 0},
         .dtype = DType::bfloat16});
  }
}
