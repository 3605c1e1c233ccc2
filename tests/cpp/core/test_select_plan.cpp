// SPDX-License-Identifier: Apache-2.0
// Every plan covers its row and fits into shared memory.
#include "core/select_plan.h"

#include "support/catch.hpp"

using namespace uncomp;

TEST_CASE("few long rows get a cluster each, many rows one block each", "[select_plan]") {
  REQUIRE(select_blocks(8, 32768, 132) == 8);
  REQUIRE(select_blocks(32, 32768, 132) == 4);
  REQUIRE(select_blocks(256, 32768, 132) == 1);
  REQUIRE(select_blocks(1, 1000, 132) == 1);
  REQUIRE(select_blocks(1, 5000, 132) == 2);
}

TEST_CASE("every plan fits and covers the row", "[select_plan]") {
  for (const int64_t shared : {99 * 1024, 163 * 1024, 227 * 1024}) {
    for (const int64_t rows : {int64_t{1}, int64_t{8}, int64_t{5000}}) {
      for (const int64_t columns : {0, 1, 127, 128, 129, 512, 2048, 2049, 8192, 32768, 131072, 1 << 20, 1 << 30}) {
        for (int32_t blocks = select_blocks(rows, columns, 132); blocks >= 1; blocks /= 2) {
          for (const int64_t width : {columns, columns + 3}) {
            const SelectPlan plan = select_plan(width, 7, shared, blocks);
            REQUIRE(plan.blocks == blocks);
            REQUIRE(1 << plan.log_blocks == blocks);
            REQUIRE(plan.shared_bytes <= shared);
            REQUIRE(plan.threads % 32 == 0);
            REQUIRE(plan.threads >= 64);
            REQUIRE(plan.threads <= kSelectMaxThreads);
            REQUIRE(plan.covered() >= width);
            REQUIRE((plan.bits == kSelectBits || (blocks == 1 && width <= kSelectShort + 3)));
          }
        }
      }
    }
  }
  REQUIRE(select_plan(8, 7, 99 * 1024, 1).cached);
  REQUIRE(select_plan(32768, 7, 227 * 1024, 1).cached);
  REQUIRE(select_plan(131072, 7, 163 * 1024, 8).cached);
  REQUIRE_FALSE(select_plan(131072, 7, 227 * 1024, 1).cached);
}
