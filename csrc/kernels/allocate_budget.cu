// SPDX-License-Identifier: Apache-2.0
// Tables of more groups than a warp has lanes; smaller ones go to allocate_few_groups.cuh.
// The rules of core/budget.h spread over a block: groups while lambda is sought, rows while tokens are handed out.
// All sums are integers, so their order does not matter.
#include "kernels/allocate_budget.h"

#include "core/budget.h"
#include "core/errors.h"
#include "kernels/allocate_few_groups.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kMaxThreads = 1024;

// A group in one word: rows that belong to it, and what has become of it.
constexpr uint32_t kRowsMask = 0xffff, kFrozenAbove = 1u << 16, kFrozenBelow = 1u << 17;
constexpr uint32_t kSeenAbove = 1u << 18, kSeenBelow = 1u << 19;  // this round's side, frozen if the round decides so
constexpr uint32_t kFrozen = kFrozenAbove | kFrozenBelow, kSeen = kSeenAbove | kSeenBelow;
static_assert(kMaxBudgetRows <= kRowsMask);

struct Scratch {
  int64_t tally[6][32];
  int64_t sum[32];
  int32_t count[32];
};

__device__ BudgetTally block_tally(const BudgetTally& own, Scratch& scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  int64_t part[6] = {own.balance, own.fraction, own.rows_above, own.weight_above, own.rows_below, own.weight_below};
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    part[i] = warp_sum(part[i]);
    if (lane == 0) scratch.tally[i][warp] = part[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 6; ++i) part[i] = warp_sum(lane < warps ? scratch.tally[i][lane] : int64_t{0});
  return {part[0], part[1], part[2], part[3], part[4], part[5]};
}

/// The part of one sequence that every step reads.
struct Sequence {
  const int32_t* group;
  const int32_t* weight;
  int32_t num_groups;

  __device__ int32_t group_of(int32_t row) const { return clamp(group[row], 0, num_groups - 1); }
  __device__ int64_t weight_of(int32_t g) const { return clamp(weight[g], 1, kMaxBudgetWeight); }
};

/// Whole tokens of a row, and its rest: -1 where the row is frozen and gets no more.
__device__ BudgetShare row_share(const Sequence& sequence, const uint32_t* cells, int32_t row, const BudgetPool& pool,
                                 const BudgetBounds& bounds) {
  const int32_t g = sequence.group_of(row);
  if (cells[g] & kFrozenAbove) return {bounds.high, -1};
  if (cells[g] & kFrozenBelow) return {bounds.low, -1};
  return budget_share(pool.left, sequence.weight_of(g), pool.weight_sum);
}

__global__ void __launch_bounds__(kMaxThreads)
    allocate_budget_kernel(const __grid_constant__ AllocateBudgetParams p, int32_t* error) {
  extern __shared__ uint32_t cells[];  // [G]
  __shared__ Scratch scratch;
  const int32_t n = blockIdx.x, thread = threadIdx.x, threads = blockDim.x;
  const Sequence sequence{p.group + static_cast<int64_t>(n) * p.rows, p.weight + n * p.weight_stride, p.num_groups};
  int32_t* limit = p.limit + static_cast<int64_t>(n) * p.rows;
  const int32_t length = max_of(p.length[n], 0), total = max_of(p.total[n], 0);
  const BudgetBounds bounds = budget_bounds(p.rows, length, total, p.floor);

  // ---- rows of each group; values outside their range are clamped and noted
  bool outside = p.length[n] < 0;
  for (int32_t g = thread; g < p.num_groups; g += threads) {
    cells[g] = 0;
    outside |= sequence.weight[g] != sequence.weight_of(g);
  }
  __syncthreads();
  int64_t weights = 0;
  for (int32_t h = thread; h < p.rows; h += threads) {
    const int32_t g = sequence.group_of(h);
    outside |= sequence.group[h] != g;
    atomicAdd(&cells[g], 1u);
    weights += sequence.weight_of(g);
  }
  if (outside) atomicCAS(error, 0, static_cast<int32_t>(DeviceError::allocate_budget_input));
  if (!bounds.feasible || p.total[n] < 0) {
    if (thread == 0) atomicCAS(error, 0, static_cast<int32_t>(DeviceError::allocate_budget_total));
    for (int32_t h = thread; h < p.rows; h += threads) limit[h] = p.floor;
    return;
  }
  BudgetPool pool{total, block_sum(weights, scratch.sum)};

  // ---- freeze groups until no free group's share lies outside the bounds
  BudgetSide decision = BudgetSide::free;
  for (;;) {
    BudgetTally own;
    for (int32_t g = thread; g < p.num_groups; g += threads) {
      uint32_t cell = cells[g];
      if (decision == BudgetSide::above && (cell & kSeenAbove)) cell |= kFrozenAbove;
      if (decision == BudgetSide::below && (cell & kSeenBelow)) cell |= kFrozenBelow;
      cell &= ~kSeen;
      if ((cell & kRowsMask) != 0 && (cell & kFrozen) == 0) {
        const int64_t weight = sequence.weight_of(g);
        const BudgetShare share = budget_share(pool.left, weight, pool.weight_sum);
        const BudgetSide side = budget_side(share, bounds);
        own.add(side, share, cell & kRowsMask, weight, bounds);
        if (side == BudgetSide::above) cell |= kSeenAbove;
        if (side == BudgetSide::below) cell |= kSeenBelow;
      }
      cells[g] = cell;
    }
    const BudgetTally tally = block_tally(own, scratch);
    decision = budget_decide(tally, pool.weight_sum);
    if (decision == BudgetSide::free) break;
    pool.freeze(decision, tally, bounds);
  }

  // ---- whole parts; what they leave goes to the largest rests
  // Each thread keeps the share of its first row: up to 1024 rows nothing is divided twice.
  BudgetShare first{0, -1};
  if (thread < p.rows) first = row_share(sequence, cells, thread, pool, bounds);
  const auto share_of = [&](int32_t h) { return h == thread ? first : row_share(sequence, cells, h, pool, bounds); };
  int64_t whole = 0;
  for (int32_t h = thread; h < p.rows; h += threads) {
    const BudgetShare share = share_of(h);
    whole += share.rest >= 0 ? share.whole : 0;
  }
  const int32_t missing = static_cast<int32_t>(pool.left - block_sum(whole, scratch.sum));
  const auto rows_from = [&](int64_t rest) {
    int32_t found = 0;
    for (int32_t h = thread; h < p.rows; h += threads) found += share_of(h).rest >= rest;
    return block_sum(found, scratch.count);
  };
  int64_t cut = 1, out = max_of<int64_t>(pool.weight_sum, 1);  // rows_from(cut) >= missing > rows_from(out)
  while (missing > 0 && out - cut > 1) {
    const int64_t middle = cut + (out - cut) / 2;
    if (rows_from(middle) >= missing) {
      cut = middle;
    } else {
      out = middle;
    }
  }
  const int32_t at_cut = missing > 0 ? missing - rows_from(cut + 1) : 0;

  // ---- ties at the cut go to the lower rows
  int32_t ties_before = 0;
  for (int32_t base = 0; base < p.rows; base += threads) {
    const int32_t h = base + thread;
    const BudgetShare share = h < p.rows ? share_of(h) : BudgetShare{0, -1};
    const bool tie = share.rest == cut;
    int32_t ties = 0;
    const int32_t before = ties_before + block_exclusive_sum<int32_t>(tie, scratch.count, &ties);
    const bool more = missing > 0 && (share.rest > cut || (tie && before < at_cut));
    if (h < p.rows) limit[h] = static_cast<int32_t>(share.whole + more);
    ties_before += ties;
  }
}

}  // namespace

cudaError_t allocate_budget(const AllocateBudgetParams& params, cudaStream_t stream) {
  if (params.count == 0 || params.rows == 0) return cudaSuccess;
  int32_t* error = nullptr;
  if (const cudaError_t err = error_word(&error); err != cudaSuccess) return err;
  if (params.num_groups <= kFewGroups) {
    const int32_t threads = min_of(kMaxThreads, round_up(params.rows, 32));
    if (threads == 32) {
      allocate_few_groups_kernel<true><<<params.count, threads, 0, stream>>>(params, error);
    } else {
      allocate_few_groups_kernel<false><<<params.count, threads, 0, stream>>>(params, error);
    }
    return cudaGetLastError();
  }
  const void* kernel = reinterpret_cast<const void*>(&allocate_budget_kernel);
  const size_t shared = sizeof(uint32_t) * static_cast<size_t>(params.num_groups);
  // Static and dynamic shared memory share one limit, so the large size is asked for once it could matter.
  if (const cudaError_t err = allow_shared_memory(kernel, sizeof(uint32_t) * kMaxBudgetRows); err != cudaSuccess) {
    return err;
  }
  const int32_t threads = min_of(kMaxThreads, round_up(max_of(params.rows, params.num_groups), 32));
  allocate_budget_kernel<<<params.count, threads, shared, stream>>>(params, error);
  return cudaGetLastError();
}

}  // namespace uncomp::kernels
