// SPDX-License-Identifier: Apache-2.0
// decode_attention: CUDA body.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/decode_attention/decode_attention.h"
#include "ops/arena.h"
#include "ops/decode_attention.h"
#include "ops/key_transform_cuda.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

std::tuple<at::Tensor, at::Tensor> decode_attention_cuda(
    const at::Tensor& query, const at::Tensor& key_rows, const at::Tensor& value_rows, const at::Tensor& row_start,
    const at::Tensor& row_len, double scale, const std::optional<at::Tensor>& key_basis,
    const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& key_norm, double key_norm_eps,
    const std::optional<at::Tensor>& rotary_frequency, double rotary_scale,
    const std::optional<at::Tensor>& slot_position, const std::optional<at::Tensor>& position_offset) {
  const KeyTransform transform{key_basis,        key_bias,     key_norm,      key_norm_eps,
                               rotary_frequency, rotary_scale, slot_position, position_offset};
  check_decode_attention(query, key_rows, value_rows, row_start, row_len, scale, transform);
  const CudaScope scope(query);
  const int64_t batch = query.size(0), heads = query.size(1), num_rows = row_len.size(0);
  const HeadLayout layout = check_head_layout("decode_attention", batch, heads, num_rows);
  at::Tensor out = at::empty({batch, heads, 1, value_rows.size(1)}, query.options());
  at::Tensor lse = at::empty({batch, heads}, query.options().dtype(at::kFloat));

  kernels::DecodeAttentionParams params{};
  set_arena(params, query, key_rows, value_rows, row_start, row_len, layout, scale, out, lse);
  params.query_batch_stride = query.stride(0);
  params.query_head_stride = query.stride(1);

  kernels::KeyTransformParams keys{};
  if (transform.given()) keys = key_transform_params("decode_attention", transform, layout.rows_per_sequence);
  const kernels::KeyTransformParams* const made = transform.given() ? &keys : nullptr;

  int64_t bytes = 0;
  check_launch("decode_attention", kernels::decode_attention_workspace_bytes(params, &bytes, made));
  const at::Tensor work = workspace(query, bytes);
  check_launch("decode_attention", kernels::decode_attention(params, work.mutable_data_ptr(), scope.stream(), made));
  return {out, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("decode_attention", &decode_attention_cuda); }

}  // namespace
}  // namespace uncomp
