// SPDX-License-Identifier: Apache-2.0
// Every plan covers its row, fits into shared memory, and gives each thread whole bins.
#include "core/select_plan.h"

#include "support/catch.hpp"

using namespace uncomp;

TEST_CASE("few long rows get a cluster each, many rows one block each", "[select_plan]") {
  REQUIRE(select_blocks(8, 32768, 132) == 8);
  REQUIRE(select_blocks(32, 32768, 132) == 4);
  REQUIRE(select_blocks(256, 32768, 132) == 1);
  REQUIRE(select_blocks(1, 1000, 132) == 1);
  REQUIRE(select_blocks(1, 5000, 132) == 4);
}

TEST_CASE("every plan fits, covers the row and has whole bins a thread", "[select_plan]") {
  for (const int64_t shared : {99 * 1024, 163 * 1024, 227 * 1024}) {
    for (const int32_t pool : {1, 7, 129}) {
      for (const int64_t rows : {int64_t{1}, int64_t{8}, int64_t{5000}}) {
        for (const int64_t columns : {0, 1, 512, 513, 1024, 32768, 131072, 1 << 20, 1 << 30}) {
          for (int32_t blocks = select_blocks(rows, columns, 132); blocks >= 1; blocks /= 2) {
            const SelectPlan plan = select_plan(rows, columns, pool, shared, blocks);
            REQUIRE(plan.shared_bytes <= shared);
            REQUIRE(plan.threads % 32 == 0);
            REQUIRE(kSelectBins1 % plan.threads == 0);
            REQUIRE(kSelectBins3 % plan.threads == 0);
            REQUIRE(plan.workspace_bytes == (plan.resident ? 0 : rows * columns * 4));
            if (plan.resident) REQUIRE(int64_t{plan.stage} * blocks >= columns);
            REQUIRE((plan.stage > 0 || columns == 0));
          }
        }
      }
    }
  }
  REQUIRE(select_plan(8, 32768, 7, 163 * 1024, 1).resident);
  REQUIRE(select_plan(8, 131072, 7, 227 * 1024, 8).resident);
  REQUIRE_FALSE(select_plan(8, 131072, 7, 227 * 1024, 1).resident);
}
