// SPDX-License-Identifier: Apache-2.0
// allocate_budget: checks, the C++ entry and the CPU body.
#include "ops/allocate_budget.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "core/budget.h"
#include "ops/call.h"
#include "ops/check.h"
#include "ops/threads.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "allocate_budget";

}  // namespace

at::Tensor allocate_budget(const at::Tensor& group, const at::Tensor& weight, const at::Tensor& length,
                           const at::Tensor& total, int64_t floor) {
  static const auto op =
      op_handle<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t)>(
          "uncomp::allocate_budget");
  return op.call(group, weight, length, total, floor);
}

void check_allocate_budget(const at::Tensor& group, const at::Tensor& weight, const at::Tensor& length,
                           const at::Tensor& total, int64_t floor) {
  check_dtype(kOp, "group", group, at::kInt);
  check_rank(kOp, "group", group, 2, "[N, H]");
  check_contiguous(kOp, "group", group);
  check_dtype(kOp, "weight", weight, at::kInt);
  check_device(kOp, "weight", weight, "group", group);
  UNCOMP_CHECK_VALUE(kOp, weight.dim() == 1 || (weight.dim() == 2 && weight.size(0) == group.size(0)),
                     "weight must have shape [G] or [N, G] with N = ", group.size(0), "; got ", weight.sizes());
  check_contiguous(kOp, "weight", weight);
  UNCOMP_CHECK_VALUE(kOp, weight.size(-1) >= 1, "weight must hold at least one group; got ", weight.sizes());
  check_int32(kOp, "length", length, {group.size(0)}, "[N]", "group", group);
  check_int32(kOp, "total", total, {group.size(0)}, "[N]", "group", group);
  UNCOMP_CHECK_VALUE(kOp, floor >= 0 && fits<int32_t>(floor), "floor must lie in [0, 2^31); got ", floor);
  check_int32_size(kOp, "sequences N", group.size(0));
  UNCOMP_CHECK_LIMIT(kOp, group.size(1) <= kMaxBudgetRows, "rows H must be at most ", kMaxBudgetRows, "; got ",
                     group.size(1));
  UNCOMP_CHECK_LIMIT(kOp, weight.size(-1) <= kMaxBudgetRows, "groups G must be at most ", kMaxBudgetRows, "; got ",
                     weight.size(-1));
}

namespace {

at::Tensor allocate_budget_cpu(const at::Tensor& group, const at::Tensor& weight, const at::Tensor& length,
                               const at::Tensor& total, int64_t floor) {
  check_allocate_budget(group, weight, length, total, floor);
  const int64_t count = group.size(0), groups = weight.size(-1);
  const int32_t rows = static_cast<int32_t>(group.size(1));
  const int32_t* group_data = group.const_data_ptr<int32_t>();
  const int32_t* weight_data = weight.const_data_ptr<int32_t>();
  const int32_t* length_data = length.const_data_ptr<int32_t>();
  const int32_t* total_data = total.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < count * rows; ++i) {
    UNCOMP_CHECK_VALUE(kOp, group_data[i] >= 0 && group_data[i] < groups, "group must lie in [0, G = ", groups,
                       "); got ", group_data[i]);
  }
  for (int64_t i = 0; i < weight.numel(); ++i) {
    UNCOMP_CHECK_VALUE(kOp, weight_data[i] >= 1 && weight_data[i] <= kMaxBudgetWeight, "weight must lie in [1, ",
                       kMaxBudgetWeight, "]; got ", weight_data[i]);
  }
  for (int64_t n = 0; n < count; ++n) {
    UNCOMP_CHECK_VALUE(kOp, length_data[n] >= 0, "length must not be negative; got ", length_data[n]);
    UNCOMP_CHECK_VALUE(kOp, budget_bounds(rows, length_data[n], total_data[n], floor).feasible,
                       "total must be at least rows * floor = ", rows * floor, "; got ", total_data[n]);
  }

  at::Tensor limit = at::empty({count, rows}, group.options());
  int32_t* out = limit.mutable_data_ptr<int32_t>();
  const int64_t weight_stride = weight.dim() == 2 ? groups : 0;
  share(count, threads_for(group.numel() * 8), [&](int64_t n, int64_t) {
    allocate_rows(group_data + n * rows, rows, weight_data + n * weight_stride, static_cast<int32_t>(groups),
                  length_data[n], total_data[n], static_cast<int32_t>(floor), out + n * rows);
  });
  return limit;
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("allocate_budget", &allocate_budget_cpu); }

}  // namespace
}  // namespace uncomp
