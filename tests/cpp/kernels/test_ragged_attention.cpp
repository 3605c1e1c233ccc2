// SPDX-License-Identifier: Apache-2.0
// The launches themselves against a plain loop: tile borders, causal diagonals, padding, parts, guard bands, repeated
// bits.
#include <random>

#include "support/ragged_call.hpp"

using namespace uncomp;
using namespace uncomp::test;
using namespace uncomp::test::ragged;

namespace {

void run(const Problem& p) {
  CAPTURE(p.group, p.tokens, p.key_dim, p.value_dim, static_cast<int>(p.dtype), static_cast<int>(p.fresh));
  Call call(p);
  call.launch();
  const auto first = call.results();
  REQUIRE(call.guards_intact());
  call.check();
  call.poison();
  call.launch();
  REQUIRE(call.results() == first);
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

TEST_CASE("tiles of 128 queries and of 128 keys at their borders", "[ragged_attention]") {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    for (const New fresh : kNews) {
      for (const int32_t tokens : {16, 17, 31, 32, 33, 65}) {
        run({.len = {127, 128, 129, 255, 256, 257},
             .batch = 2,
             .tokens = tokens,
             .key_dim = 128,
             .value_dim = 128,
             .fresh = fresh,
             .dtype = dtype});
      }
    }
  }
  for (const int32_t group : {1, 2, 3, 5, 8, 16}) {
    for (const int32_t tokens : {1, 7, 43, 150}) {
      run({.len = {300, 0},
           .group = group,
           .tokens = tokens,
           .fresh = New::keys,
           .first = {1},
           .length = {tokens - 1}});
    }
  }
}

TEST_CASE("head dims that do not fill a panel of 64 channels", "[ragged_attention]") {
  const std::vector<std::pair<int32_t, int32_t>> dims = {{64, 128}, {128, 64}, {56, 64},   {72, 120},
                                                         {96, 96},  {8, 128},  {136, 256}, {248, 8}};
  for (const auto& [key_dim, value_dim] : dims) {
    for (const New fresh : kNews) {
      run({.len = {200, 129, 1},
           .tokens = 35,
           .key_dim = key_dim,
           .value_dim = value_dim,
           .fresh = fresh,
           .dtype = DType::bfloat16});
    }
  }
}

TEST_CASE("scales that are not positive", "[ragged_attention]") {
  for (const float factor : {-1.0f, 0.0f}) {
    run({.len = {200, 30}, .tokens = 20, .fresh = New::keys, .dtype = DType::bfloat16, .scale_factor = factor});
  }
}

TEST_CASE("shares that end inside tiles, rows of every length", "[ragged_attention]") {
  std::vector<int32_t> len;
  for (int32_t r = 0; r < 96; ++r) len.push_back(r % 7 == 0 ? 0 : r * 37 % 1900);
  for (const New fresh : kNews) run({.len = len, .batch = 12, .tokens = 3, .fresh = fresh, .dtype = DType::bfloat16});
  for (const New fresh : kNews) {
    run({.len = {3000, 40, 700, 0, 1500, 1},
         .batch = 2,
         .tokens = 60,
         .fresh = fresh,
         .first = {0, 13},
         .length = {60, 40},
         .dtype = DType::bfloat16});
  }
}

TEST_CASE("one graph follows lengths that change, over a poisoned workspace", "[ragged_attention]") {
  const std::vector<int32_t> most = {900, 2000, 130, 0, 640, 1};
  std::mt19937 random(9);
  Call call({.len = most, .batch = 2, .tokens = 21, .fresh = New::keys});
  const auto shorten = [&](int) {
    std::vector<int32_t> len;
    for (const int32_t n : most) len.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(n + 1)));
    call.shorten(len);
  };
  require_graph_follows(call, 8, shorten, [&](int) { call.check(); });
}

TEST_CASE("a thousand launches in a row, and two streams at once, repeat every bit", "[ragged_attention][large]") {
  Call a({.len = {20000, 3, 0, 9000}, .tokens = 4, .key_dim = 128, .value_dim = 128});
  Call b({.len = {1000, 517, 2070, 1034},
          .tokens = 300,
          .key_dim = 128,
          .value_dim = 128,
          .fresh = New::keys,
          .dtype = DType::bfloat16});
  require_repeats(a, 1000, 100);
  require_repeats(b, 1000, 100);
  require_apart(10, 100, a, b);
}
