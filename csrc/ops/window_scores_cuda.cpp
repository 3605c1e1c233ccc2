// SPDX-License-Identifier: Apache-2.0
// window_scores: CUDA body.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/window_scores/window_scores.h"
#include "ops/check.h"
#include "ops/stream.h"
#include "ops/window_scores.h"

namespace uncomp {
namespace {

using Optional = std::optional<at::Tensor>;

Strides3 token_strides(const at::Tensor& t) {
  return t.dim() == 2 ? Strides3{0, 0, t.stride(0)} : Strides3{t.stride(0), t.stride(1), t.stride(2)};
}

std::tuple<at::Tensor, at::Tensor> window_scores_cuda(const at::Tensor& query, const at::Tensor& key,
                                                      const Optional& value, const Optional& first,
                                                      const Optional& length, const Optional& row_start,
                                                      const Optional& row_len, int64_t columns, double scale,
                                                      c10::string_view reduce_window, c10::string_view reduce_group) {
  const WindowScoresPlan plan = check_window_scores(query, key, value, first, length, row_start, row_len, columns,
                                                    scale, reduce_window, reduce_group);
  const CudaScope scope(query);
  const auto f32 = query.options().dtype(at::kFloat);
  at::Tensor scores = at::empty({plan.score_rows, plan.width}, f32);
  at::Tensor lse = at::empty({plan.batch, plan.num_q_heads, plan.window}, f32);
  kernels::WindowScoresParams params{};
  params.query = query.const_data_ptr();
  params.key = key.const_data_ptr();
  params.value = value.has_value() ? value->const_data_ptr() : nullptr;
  params.rows.rows_per_sequence = plan.rows_per_sequence;
  if (plan.arena) {
    params.rows.arena = {row_start->const_data_ptr<int32_t>(), row_len->const_data_ptr<int32_t>(), key.size(0),
                         plan.num_rows};
  } else {
    params.rows.dense = {data_or_null<int32_t>(first), data_or_null<int32_t>(length), plan.width};
  }
  params.query_stride = token_strides(query);
  params.key_stride = token_strides(key);
  if (value.has_value()) {
    params.value_stride = token_strides(*value);
    params.value_dim = static_cast<int32_t>(value->size(-1));
  }
  params.scores = scores.mutable_data_ptr<float>();
  params.lse = lse.mutable_data_ptr<float>();
  params.batch = plan.batch;
  params.num_q_heads = plan.num_q_heads;
  params.window = plan.window;
  params.head_dim = plan.head_dim;
  params.num_rows = plan.num_rows;
  params.group_size = plan.group_size;
  params.width = plan.width;
  params.scale = static_cast<float>(scale);
  params.reduce_window = plan.reduce_window;
  params.reduce_group = plan.reduce_group;
  params.dtype = kernel_dtype(query);
  size_t bytes = 0;
  check_launch("window_scores", kernels::window_scores_workspace_bytes(params, &bytes));
  const at::Tensor scratch = workspace(query, static_cast<int64_t>(bytes));
  check_launch("window_scores", kernels::window_scores(params, scratch.mutable_data_ptr(), scope.stream()));
  return {scores, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("window_scores", &window_scores_cuda); }

}  // namespace
}  // namespace uncomp
