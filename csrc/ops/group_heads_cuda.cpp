// SPDX-License-Identifier: Apache-2.0
// group_heads: CUDA body.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/group_heads.h"
#include "ops/check.h"
#include "ops/group_heads.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

std::tuple<at::Tensor, at::Tensor> group_heads_cuda(const at::Tensor& entropy, int64_t num_groups,
                                                    std::string_view order) {
  const bool reverse = check_group_heads(entropy, num_groups, order);
  const CudaScope scope(entropy);
  at::Tensor group = at::empty(entropy.sizes(), entropy.options().dtype(at::kInt));
  at::Tensor rank = at::empty(entropy.sizes(), entropy.options().dtype(at::kInt));
  kernels::GroupHeadsParams params{};
  params.entropy = entropy.const_data_ptr<float>();
  params.group = group.mutable_data_ptr<int32_t>();
  params.rank = rank.mutable_data_ptr<int32_t>();
  params.row_stride = entropy.stride(0);
  params.count = static_cast<int32_t>(entropy.size(0));
  params.rows = static_cast<int32_t>(entropy.size(1));
  params.num_groups = static_cast<int32_t>(num_groups);
  params.reverse = reverse;
  check_launch("group_heads", kernels::group_heads(params, scope.stream()));
  return {group, rank};
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("group_heads", &group_heads_cuda); }

}  // namespace
}  // namespace uncomp
