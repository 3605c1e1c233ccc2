// SPDX-License-Identifier: Apache-2.0
// ragged_attention: CUDA body.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/ragged_attention/ragged_attention.h"
#include "ops/arena.h"
#include "ops/ragged_attention.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

using Optional = std::optional<at::Tensor>;

Strides3 strides3(const at::Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

std::tuple<at::Tensor, at::Tensor> ragged_attention_cuda(const at::Tensor& query, const Optional& key,
                                                         const Optional& value, const Optional& other_out,
                                                         const Optional& other_lse, const Optional& first,
                                                         const Optional& length, const at::Tensor& key_rows,
                                                         const at::Tensor& value_rows, const at::Tensor& row_start,
                                                         const at::Tensor& row_len, double scale) {
  check_ragged_attention(query, key, value, other_out, other_lse, first, length, key_rows, value_rows, row_start,
                         row_len, scale);
  const CudaScope scope(query);
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2), num_rows = row_len.size(0);
  const HeadLayout layout = check_head_layout("ragged_attention", batch, heads, num_rows);
  at::Tensor out = at::empty({batch, heads, tokens, value_rows.size(1)}, query.options());
  at::Tensor lse = at::empty({batch, heads, tokens}, query.options().dtype(at::kFloat));

  kernels::RaggedAttentionParams params{};
  set_arena(params, query, key_rows, value_rows, row_start, row_len, layout, scale, out, lse);
  params.query_strides = strides3(query);
  params.rows_per_kv_head = 1;
  if (key.has_value()) {
    params.key = key->const_data_ptr();
    params.value = value->const_data_ptr();
    params.key_strides = strides3(*key);
    params.value_strides = strides3(*value);
    params.rows_per_kv_head = static_cast<int32_t>(layout.rows_per_sequence / key->size(1));
  }
  if (other_out.has_value()) {
    params.other_out = other_out->const_data_ptr();
    params.other_lse = other_lse->const_data_ptr<float>();
    params.other_out_strides = strides3(*other_out);
    params.other_lse_strides = strides3(*other_lse);
  }
  params.tokens = {data_or_null<int32_t>(first), data_or_null<int32_t>(length), static_cast<int32_t>(tokens)};

  int64_t bytes = 0;
  check_launch("ragged_attention", kernels::ragged_attention_workspace_bytes(params, &bytes));
  const at::Tensor work = workspace(query, bytes);
  check_launch("ragged_attention", kernels::ragged_attention(params, work.mutable_data_ptr(), scope.stream()));
  return {out, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("ragged_attention", &ragged_attention_cuda); }

}  // namespace
}  // namespace uncomp
