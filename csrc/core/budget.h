// SPDX-License-Identifier: Apache-2.0
// Sizes of head groups and the exact split of a token budget over them, in integers.
//
// Every row h of weight s_h gets clamp(lambda * s_h, low, high), and lambda makes the sum the total. lambda is found by
// freezing: share what is left among the free rows; if the excess above `high` is at least the shortage below `low`,
// freeze the rows above at `high`, else the rows below at `low`; repeat. The CPU walks over the groups, the kernel
// spreads them over a block; both add the same integers, so both find the same plan.
#pragma once

#include <cstdint>
#include <vector>

#include "core/constants.h"
#include "core/math.h"

namespace uncomp {

/// `rows` ranked rows cut into `groups` groups of a = rows / groups; what is left over goes to the outer groups in
/// turn: last, first, last but one, second, ... 1 <= groups <= rows.
struct GroupSizes {
  int32_t base;         // rows of a middle group
  int32_t front, back;  // groups with one row more, counted from the first and from the last
  int32_t groups;

  UNCOMP_HD constexpr GroupSizes(int32_t rows, int32_t num_groups)
      : base(rows / num_groups), front(rows % num_groups / 2), back((rows % num_groups + 1) / 2), groups(num_groups) {}

  UNCOMP_HD constexpr int32_t size(int32_t group) const {
    return base + (group < front || group >= groups - back ? 1 : 0);
  }
  /// Group of the row that stands at `rank` of the ranking.
  UNCOMP_HD constexpr int32_t group_of(int32_t rank) const {
    const int32_t front_rows = front * (base + 1);
    if (rank < front_rows) return rank / (base + 1);
    const int32_t middle = groups - front - back, middle_rows = middle * base;
    if (rank < front_rows + middle_rows) return front + (rank - front_rows) / base;
    return front + middle + (rank - front_rows - middle_rows) / (base + 1);
  }
};

/// Bounds of a row's limit, tokens. Not feasible: the total does not hold every row's lower bound.
struct BudgetBounds {
  int64_t low, high;
  bool feasible;
};

UNCOMP_HD constexpr BudgetBounds budget_bounds(int64_t rows, int64_t length, int64_t total, int64_t floor) {
  constexpr int64_t kUnbounded = 2147483647;  // no limit passes the total, which is an int32
  const bool scarce = length * rows > total;
  const int64_t low = scarce ? floor : max_of(floor, length);
  return {low, scarce ? length : kUnbounded, rows * low <= total};
}

/// left * weight / weight_sum as whole tokens and a rest, the fraction times weight_sum. At most kMaxBudgetRows rows of
/// weight up to kMaxBudgetWeight and totals below 2^31 keep every product here and below under 2^52.
struct BudgetShare {
  int64_t whole, rest;
};

UNCOMP_HD constexpr BudgetShare budget_share(int64_t left, int64_t weight, int64_t weight_sum) {
  const int64_t product = left * weight, whole = product / weight_sum;
  return {whole, product - whole * weight_sum};
}

enum class BudgetSide : int32_t { free, above, below };

/// Where a share lies. Integer bounds: below means whole < low, above means whole > high or whole = high and a rest.
UNCOMP_HD constexpr BudgetSide budget_side(BudgetShare share, const BudgetBounds& bounds) {
  if (share.whole > bounds.high || (share.whole == bounds.high && share.rest > 0)) return BudgetSide::above;
  return share.whole < bounds.low ? BudgetSide::below : BudgetSide::free;
}

/// Sums of one round over the free groups. Excess minus shortage = balance + fraction / weight_sum.
struct BudgetTally {
  int64_t balance = 0, fraction = 0;
  int64_t rows_above = 0, weight_above = 0, rows_below = 0, weight_below = 0;

  UNCOMP_HD constexpr void add(BudgetSide side, BudgetShare share, int64_t rows, int64_t weight,
                               const BudgetBounds& bounds) {
    if (side == BudgetSide::free) return;
    const bool above = side == BudgetSide::above;
    balance += rows * (share.whole - (above ? bounds.high : bounds.low));
    fraction += rows * share.rest;
    (above ? rows_above : rows_below) += rows;
    (above ? weight_above : weight_below) += rows * weight;
  }
};

/// What a round decides: which side is frozen; `free` ends the rounds.
UNCOMP_HD constexpr BudgetSide budget_decide(const BudgetTally& tally, int64_t weight_sum) {
  if (tally.rows_above == 0 && tally.rows_below == 0) return BudgetSide::free;
  // balance is whole, so adding the floor of the fraction keeps the sign.
  return tally.balance + tally.fraction / weight_sum >= 0 ? BudgetSide::above : BudgetSide::below;
}

/// What is left to the free rows, and their weights together.
struct BudgetPool {
  int64_t left, weight_sum;

  UNCOMP_HD constexpr void freeze(BudgetSide side, const BudgetTally& tally, const BudgetBounds& bounds) {
    const bool above = side == BudgetSide::above;
    left -= above ? tally.rows_above * bounds.high : tally.rows_below * bounds.low;
    weight_sum -= above ? tally.weight_above : tally.weight_below;
  }
};

/// Limits of the rows of one sequence. Group ids lie in [0, groups), weights in [1, kMaxBudgetWeight]. Returns false,
/// and gives every row the floor, when the total does not hold the lower bounds.
inline bool allocate_rows(const int32_t* group, int32_t rows, const int32_t* weight, int32_t groups, int32_t length,
                          int32_t total, int32_t floor, int32_t* limit) {
  const BudgetBounds bounds = budget_bounds(rows, length, total, floor);
  if (!bounds.feasible) {
    for (int32_t h = 0; h < rows; ++h) limit[h] = floor;
    return false;
  }
  std::vector<int64_t> count(groups, 0);
  BudgetPool pool{total, 0};
  for (int32_t h = 0; h < rows; ++h) {
    ++count[group[h]];
    pool.weight_sum += weight[group[h]];
  }
  std::vector<BudgetSide> frozen(groups, BudgetSide::free), side(groups, BudgetSide::free);
  for (;;) {
    BudgetTally tally;
    for (int32_t g = 0; g < groups; ++g) {
      side[g] = BudgetSide::free;
      if (count[g] == 0 || frozen[g] != BudgetSide::free) continue;
      const BudgetShare share = budget_share(pool.left, weight[g], pool.weight_sum);
      side[g] = budget_side(share, bounds);
      tally.add(side[g], share, count[g], weight[g], bounds);
    }
    const BudgetSide decision = budget_decide(tally, pool.weight_sum);
    if (decision == BudgetSide::free) break;
    for (int32_t g = 0; g < groups; ++g) {
      if (side[g] == decision) frozen[g] = decision;
    }
    pool.freeze(decision, tally, bounds);
  }

  // Whole parts, then one token each to the largest rests, ties to the lower row.
  std::vector<BudgetShare> share(groups, BudgetShare{0, -1});
  int64_t missing = pool.left;
  for (int32_t g = 0; g < groups; ++g) {
    if (frozen[g] != BudgetSide::free) {
      share[g] = {frozen[g] == BudgetSide::above ? bounds.high : bounds.low, -1};
    } else if (count[g] > 0) {
      share[g] = budget_share(pool.left, weight[g], pool.weight_sum);
      missing -= count[g] * share[g].whole;
    }
  }
  const auto rows_from = [&](int64_t rest) {
    int64_t sum = 0;
    for (int32_t g = 0; g < groups; ++g) sum += share[g].rest >= rest ? count[g] : 0;
    return sum;
  };
  int64_t cut = 1, out = max_of<int64_t>(pool.weight_sum, 1);  // rows_from(cut) >= missing > rows_from(out)
  while (out - cut > 1) {
    const int64_t middle = cut + (out - cut) / 2;
    (rows_from(middle) >= missing ? cut : out) = middle;
  }
  int64_t at_cut = missing - rows_from(cut + 1);
  for (int32_t h = 0; h < rows; ++h) {
    const BudgetShare s = share[group[h]];
    const bool more = missing > 0 && (s.rest > cut || (s.rest == cut && at_cut-- > 0));
    limit[h] = static_cast<int32_t>(s.whole + (more ? 1 : 0));
  }
  return true;
}

}  // namespace uncomp
