// SPDX-License-Identifier: Apache-2.0
// group_heads: checks, the C++ entry and the CPU body.
#include "ops/group_heads.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "core/budget.h"
#include "core/select_keys.h"
#include "ops/call.h"
#include "ops/check.h"
#include "ops/threads.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "group_heads";

}  // namespace

std::tuple<at::Tensor, at::Tensor> group_heads(const at::Tensor& entropy, int64_t num_groups, std::string_view order) {
  static const auto op = op_handle<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, int64_t, std::string_view)>(
      "uncomp::group_heads");
  return op.call(entropy, num_groups, order);
}

bool check_group_heads(const at::Tensor& entropy, int64_t num_groups, std::string_view order) {
  check_dtype(kOp, "entropy", entropy, at::kFloat);
  check_rank(kOp, "entropy", entropy, 2, "[N, H]");
  check_last_contiguous(kOp, "entropy", entropy);
  check_int32_size(kOp, "rankings N", entropy.size(0));
  check_int32_size(kOp, "rows H", entropy.size(1));
  UNCOMP_CHECK_VALUE(kOp, num_groups >= 1 && num_groups <= entropy.size(1),
                     "num_groups must lie in 1 .. H = ", entropy.size(1), "; got ", num_groups);
  UNCOMP_CHECK_VALUE(kOp, order == "ascending" || order == "reverse",
                     "order must be \"ascending\" or \"reverse\"; got \"", std::string(order), "\"");
  return order == "reverse";
}

namespace {

std::tuple<at::Tensor, at::Tensor> group_heads_cpu(const at::Tensor& entropy, int64_t num_groups,
                                                   std::string_view order) {
  const bool reverse = check_group_heads(entropy, num_groups, order);
  const int64_t count = entropy.size(0), stride = entropy.stride(0);
  const int32_t rows = static_cast<int32_t>(entropy.size(1)), groups = static_cast<int32_t>(num_groups);
  at::Tensor group = at::empty({count, rows}, entropy.options().dtype(at::kInt));
  at::Tensor rank = at::empty({count, rows}, entropy.options().dtype(at::kInt));
  const float* from = entropy.const_data_ptr<float>();
  int32_t* group_out = group.mutable_data_ptr<int32_t>();
  int32_t* rank_out = rank.mutable_data_ptr<int32_t>();
  const GroupSizes sizes(rows, groups);
  const int64_t threads = shared_by(count, threads_for(entropy.numel() * 8));
  std::vector<int32_t> places(threads * rows);
  share(count, threads, [&](int64_t n, int64_t thread) {
    int32_t* sorted = places.data() + thread * rows;
    const float* e = from + n * stride;
    std::iota(sorted, sorted + rows, 0);
    std::stable_sort(sorted, sorted + rows, [&](int32_t a, int32_t b) { return rank_key(e[a]) < rank_key(e[b]); });
    for (int32_t place = 0; place < rows; ++place) {
      const int32_t g = sizes.group_of(place);
      rank_out[n * rows + sorted[place]] = place;
      group_out[n * rows + sorted[place]] = reverse ? groups - 1 - g : g;
    }
  });
  return {group, rank};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("group_heads", &group_heads_cpu); }

}  // namespace
}  // namespace uncomp
