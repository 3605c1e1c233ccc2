// SPDX-License-Identifier: Apache-2.0
// Integer arithmetic that every kernel's indexing rests on.
#include "core/math.h"

#include "core/dispatch.h"
#include "core/ragged.h"
#include "support/catch.hpp"

using namespace uncomp;

TEST_CASE("ceil_div and round_up count whole tiles", "[math]") {
  REQUIRE(ceil_div(0, 64) == 0);
  REQUIRE(ceil_div(1, 64) == 1);
  REQUIRE(ceil_div(64, 64) == 1);
  REQUIRE(ceil_div<int64_t>((int64_t{1} << 33) + 1, 1 << 20) == (1 << 13) + 1);
  REQUIRE(round_up(65, 64) == 128);
}

TEST_CASE("fits refuses what int32 would cut", "[math]") {
  REQUIRE(fits<int32_t>(2147483647));
  REQUIRE_FALSE(fits<int32_t>(int64_t{1} << 31));
  REQUIRE(fits<int32_t>(-(int64_t{1} << 31)));
}

TEST_CASE("head_dim_tile rounds up to a compiled tile and refuses larger dims", "[math]") {
  REQUIRE(head_dim_tile(8) == 64);
  REQUIRE(head_dim_tile(80) == 128);
  REQUIRE(head_dim_tile(256) == 256);
  REQUIRE(head_dim_tile(257) == 0);
}

TEST_CASE("dispatch_int runs exactly the listed case", "[math]") {
  int seen = 0;
  REQUIRE(dispatch_int<1, 2, 4>(2, [&](auto v) { seen = decltype(v)::value; }));
  REQUIRE(seen == 2);
  REQUIRE_FALSE(dispatch_int<1, 2, 4>(3, [&](auto) { seen = -1; }));
  REQUIRE(seen == 2);
}

TEST_CASE("ragged rows are clamped into the arena whatever the numbers say", "[math]") {
  const int32_t start[] = {0, 4, 4, 3, 100}, len[] = {9, 1, 2, -5};
  const RaggedRows rows{start, len, 10, 4};
  REQUIRE(rows.room(0) == 4);
  REQUIRE(rows.len(0) == 4);
  REQUIRE(rows.room(1) == 0);
  REQUIRE(rows.len(1) == 0);
  REQUIRE(rows.room(2) == 0);
  REQUIRE(rows.room(3) == 7);
  REQUIRE(rows.len(3) == 0);
}

TEST_CASE("valid tokens are clamped into the tensor", "[math]") {
  const int32_t first[] = {2, -1, 12}, length[] = {5, 20, 3};
  const ValidTokens tokens{first, length, 10};
  REQUIRE(tokens.begin(0) == 2);
  REQUIRE(tokens.count(0) == 5);
  REQUIRE(tokens.begin(1) == 0);
  REQUIRE(tokens.count(1) == 10);
  REQUIRE(tokens.begin(2) == 10);
  REQUIRE(tokens.count(2) == 0);
}
