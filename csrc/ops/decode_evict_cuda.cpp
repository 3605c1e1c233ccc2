// SPDX-License-Identifier: Apache-2.0
// decode_evict_: CUDA body.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/decode_evict/decode_evict.h"
#include "ops/check.h"
#include "ops/decode_evict.h"
#include "ops/key_transform_cuda.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "decode_evict_";

std::tuple<at::Tensor, at::Tensor> decode_evict_cuda(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& position,
    const at::Tensor& row_start, const at::Tensor& row_len, const at::Tensor& key_rows, const at::Tensor& value_rows,
    const at::Tensor& slot_position, const at::Tensor& votes, const at::Tensor& vote_sum, const at::Tensor& vote_step,
    const at::Tensor& order, int64_t window, int64_t sink, int64_t pool, double scale, std::string_view pool_mode,
    std::string_view reduce_group, const std::optional<at::Tensor>& key_basis,
    const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& key_norm, double key_norm_eps,
    const std::optional<at::Tensor>& rotary_frequency, double rotary_scale,
    const std::optional<at::Tensor>& position_offset) {
  const std::optional<at::Tensor> slots = slot_position;
  const KeyTransform transform{key_basis,        key_bias,     key_norm, key_norm_eps,
                               rotary_frequency, rotary_scale, slots,    position_offset};
  const DecodeEvictCall call{query,      key,           value, position,  row_start,    row_len,  key_rows,
                             value_rows, slot_position, votes, vote_sum,  vote_step,    order,    window,
                             sink,       pool,          scale, pool_mode, reduce_group, transform};
  const DecodeEvictSizes sizes = check_decode_evict(call);
  const CudaScope scope(query);
  at::Tensor out = at::empty({query.size(0), query.size(1), 1, value.size(3)}, query.options());
  at::Tensor lse = at::empty({query.size(0), query.size(1)}, query.options().dtype(at::kFloat));

  kernels::DecodeEvictParams params{};
  params.query = query.const_data_ptr();
  params.key = key.const_data_ptr();
  params.value = value.const_data_ptr();
  params.position = position.const_data_ptr<int32_t>();
  params.row_start = row_start.const_data_ptr<int32_t>();
  params.row_len = row_len.mutable_data_ptr<int32_t>();
  params.key_rows = key_rows.mutable_data_ptr();
  params.value_rows = value_rows.mutable_data_ptr();
  params.slot_position = slot_position.mutable_data_ptr<int32_t>();
  params.votes = votes.mutable_data_ptr<int32_t>();
  params.vote_sum = vote_sum.mutable_data_ptr<int32_t>();
  params.vote_step = vote_step.mutable_data_ptr<int32_t>();
  params.order = order.mutable_data_ptr<int32_t>();
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  params.query_batch = query.stride(0);
  params.query_head = query.stride(1);
  params.key_batch = key.stride(0);
  params.key_head = key.stride(1);
  params.value_batch = value.stride(0);
  params.value_head = value.stride(1);
  params.capacity = sizes.capacity;
  params.num_rows = sizes.num_rows;
  params.rows = sizes.rows;
  params.rows_per_kv = sizes.num_rows == 0 ? 1 : sizes.rows / sizes.num_kv_heads;
  params.group_size = sizes.group_size;
  params.key_dim = sizes.key_dim;
  params.value_dim = sizes.value_dim;
  params.vote_window = sizes.vote_window;
  params.window = sizes.window;
  params.sink = sizes.sink;
  params.pool = sizes.pool;
  params.scale = static_cast<float>(scale);
  params.pool_mode = sizes.pool_mode;
  params.reduce_group = sizes.reduce_group;
  params.dtype = kernel_dtype(query);

  kernels::KeyTransformParams keys{};
  if (transform.given()) keys = key_transform_params(kOp, transform, sizes.rows);

  int64_t bytes = 0;
  check_launch(kOp, kernels::decode_evict_workspace_bytes(params, &bytes));
  const at::Tensor work = workspace(query, bytes);
  check_launch(
      kOp, kernels::decode_evict(params, work.mutable_data_ptr(), scope.stream(), transform.given() ? &keys : nullptr));
  return {out, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("decode_evict_", &decode_evict_cuda); }

}  // namespace
}  // namespace uncomp
