// SPDX-License-Identifier: Apache-2.0
// allocate_budget: CUDA body.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/allocate_budget.h"
#include "ops/allocate_budget.h"
#include "ops/check.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

at::Tensor allocate_budget_cuda(const at::Tensor& group, const at::Tensor& weight, const at::Tensor& length,
                                const at::Tensor& total, int64_t floor) {
  check_allocate_budget(group, weight, length, total, floor);
  const CudaScope scope(group);
  at::Tensor limit = at::empty(group.sizes(), group.options());
  kernels::AllocateBudgetParams params{};
  params.group = group.const_data_ptr<int32_t>();
  params.weight = weight.const_data_ptr<int32_t>();
  params.length = length.const_data_ptr<int32_t>();
  params.total = total.const_data_ptr<int32_t>();
  params.limit = limit.mutable_data_ptr<int32_t>();
  params.weight_stride = weight.dim() == 2 ? weight.size(1) : 0;
  params.count = static_cast<int32_t>(group.size(0));
  params.rows = static_cast<int32_t>(group.size(1));
  params.num_groups = static_cast<int32_t>(weight.size(-1));
  params.floor = static_cast<int32_t>(floor);
  check_launch("allocate_budget", kernels::allocate_budget(params, scope.stream()));
  return limit;
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("allocate_budget", &allocate_budget_cuda); }

}  // namespace
}  // namespace uncomp
