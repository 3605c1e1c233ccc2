// SPDX-License-Identifier: Apache-2.0
// allocate_budget where one warp can hold all groups: lane g stands for group g, every warp finds the same shares, and
// the block only meets to count the rows of the groups and to order ties.
#pragma once

#include "core/budget.h"
#include "core/errors.h"
#include "kernels/allocate_budget.h"
#include "kernels/common/reduce.cuh"

namespace uncomp::kernels {

inline constexpr int kFewGroups = 32;

/// `budget_share` by a reciprocal: the product stays below 2^52, so the quotient is at most one off.
class ShareDivider {
 public:
  __device__ explicit ShareDivider(int64_t divisor) : divisor_(divisor), inverse_(1.0 / static_cast<double>(divisor)) {}

  __device__ BudgetShare share(int64_t left, int64_t weight) const {
    const int64_t product = left * weight;
    int64_t whole = static_cast<int64_t>(static_cast<double>(product) * inverse_), rest = product - whole * divisor_;
    if (rest < 0) {
      --whole;
      rest += divisor_;
    } else if (rest >= divisor_) {
      ++whole;
      rest -= divisor_;
    }
    return {whole, rest};
  }

 private:
  int64_t divisor_;
  double inverse_;
};

/// kWarp: the block is one warp, and so is every row.
template <bool kWarp>
__global__ void __launch_bounds__(kWarp ? 32 : 1024)
    allocate_few_groups_kernel(const __grid_constant__ AllocateBudgetParams p, int32_t* error) {
  __shared__ int32_t rows_of[kFewGroups];
  __shared__ int32_t scratch[32];
  const auto barrier = [] {
    if constexpr (kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };
  const int32_t n = blockIdx.x, thread = threadIdx.x, lane = thread % 32, threads = blockDim.x;
  const int32_t* group = p.group + static_cast<int64_t>(n) * p.rows;
  int32_t* limit = p.limit + static_cast<int64_t>(n) * p.rows;
  const bool known = lane < p.num_groups;
  const int32_t given_weight = known ? p.weight[n * p.weight_stride + lane] : 1;
  const int32_t first_group = thread < p.rows ? group[thread] : 0;
  const int32_t given_length = p.length[n], given_total = p.total[n];
  const auto group_of = [&](int32_t h) { return h == thread ? first_group : group[h]; };
  if (thread < kFewGroups) rows_of[thread] = 0;
  barrier();

  // ---- rows of each group; values outside their range are clamped and noted
  const int64_t weight = clamp(given_weight, 1, kMaxBudgetWeight);
  bool outside = given_length < 0 || given_weight != weight;
  for (int32_t h = thread; h < p.rows; h += threads) {
    const int32_t given = group_of(h), g = clamp(given, 0, p.num_groups - 1);
    outside |= given != g;
    atomicAdd(&rows_of[g], 1);
  }
  if (outside) atomicCAS(error, 0, static_cast<int32_t>(DeviceError::allocate_budget_input));
  const int32_t length = max_of(given_length, 0), total = max_of(given_total, 0);
  const BudgetBounds bounds = budget_bounds(p.rows, length, total, p.floor);
  if (!bounds.feasible || given_total < 0) {
    if (thread == 0) atomicCAS(error, 0, static_cast<int32_t>(DeviceError::allocate_budget_total));
    for (int32_t h = thread; h < p.rows; h += threads) limit[h] = p.floor;
    return;
  }
  barrier();
  const int32_t rows = rows_of[lane];
  BudgetPool pool{total, warp_sum(rows * weight)};

  // ---- freeze groups until no free group's share lies outside the bounds
  bool free = rows > 0;
  BudgetShare share{0, -1};
  for (;;) {
    BudgetSide side = BudgetSide::free;
    if (free) {
      share = ShareDivider(pool.weight_sum).share(pool.left, weight);
      side = budget_side(share, bounds);
    }
    if (!__any_sync(kFullWarp, side != BudgetSide::free)) break;
    BudgetTally own;
    if (free) own.add(side, share, rows, weight, bounds);
    const BudgetTally tally{warp_sum(own.balance),      warp_sum(own.fraction),   warp_sum(own.rows_above),
                            warp_sum(own.weight_above), warp_sum(own.rows_below), warp_sum(own.weight_below)};
    const BudgetSide decision = budget_decide(tally, pool.weight_sum);
    if (free && side == decision) {
      free = false;
      share = {decision == BudgetSide::above ? bounds.high : bounds.low, -1};
    }
    pool.freeze(decision, tally, bounds);
  }

  // ---- whole parts; what they leave goes to the largest rests, ties to the lower rows
  // No sum passes the total, an int32.
  const uint32_t whole = free ? static_cast<uint32_t>(rows * share.whole) : 0u;
  const int32_t missing = static_cast<int32_t>(pool.left) - static_cast<int32_t>(warp_sum(whole));
  int32_t larger = 0, equal = 0;  // rows whose rest is larger than this group's, and as large
  if (missing > 0) {
#pragma unroll 8
    for (int32_t g = 0; g < p.num_groups; ++g) {
      const int64_t rest = __shfl_sync(kFullWarp, share.rest, g);
      const int32_t count = __shfl_sync(kFullWarp, rows, g);
      larger += rest > share.rest ? count : 0;
      equal += rest == share.rest ? count : 0;
    }
  }
  const bool cut = missing > 0 && free && larger < missing && missing <= larger + equal;
  const int32_t of_all = static_cast<int32_t>(share.whole) + (missing > 0 && free && larger + equal < missing ? 1 : 0);
  const int32_t of_ties = cut ? missing - larger : 0;  // tokens that the tied rows share
  const unsigned cut_groups = __ballot_sync(kFullWarp, cut);
  const int32_t at_cut = __reduce_max_sync(kFullWarp, of_ties);

  int32_t ties_before = 0;
  for (int32_t base = 0; base < p.rows; base += threads) {
    const int32_t h = base + thread;
    const bool alive = h < p.rows;
    const int32_t g = alive ? clamp(group_of(h), 0, p.num_groups - 1) : 0;
    const int32_t tokens = __shfl_sync(kFullWarp, of_all, g);
    const bool tie = alive && (cut_groups >> g & 1u) != 0;
    int32_t before = 0;
    if constexpr (kWarp) {
      before = __popc(__ballot_sync(kFullWarp, tie) & ((1u << lane) - 1u));
    } else if (cut_groups != 0) {
      int32_t ties = 0;
      before = ties_before + block_exclusive_sum<int32_t>(tie, scratch, &ties);
      ties_before += ties;
    }
    if (alive) limit[h] = tokens + (tie && before < at_cut ? 1 : 0);
  }
}

}  // namespace uncomp::kernels
