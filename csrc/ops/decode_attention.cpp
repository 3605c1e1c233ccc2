// SPDX-License-Identifier: Apache-2.0
// decode_attention: checks, the C++ entry and the CPU body.
#include "ops/decode_attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/arena.h"
#include "ops/call.h"
#include "ops/decode_rows.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "decode_attention";

}  // namespace

std::tuple<at::Tensor, at::Tensor> decode_attention(
    const at::Tensor& query, const at::Tensor& key_rows, const at::Tensor& value_rows, const at::Tensor& row_start,
    const at::Tensor& row_len, double scale, const std::optional<at::Tensor>& key_basis,
    const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& key_norm, double key_norm_eps,
    const std::optional<at::Tensor>& rotary_frequency, double rotary_scale,
    const std::optional<at::Tensor>& slot_position, const std::optional<at::Tensor>& position_offset) {
  static const auto op = op_handle<decltype(decode_attention)>("uncomp::decode_attention");
  return op.call(query, key_rows, value_rows, row_start, row_len, scale, key_basis, key_bias, key_norm, key_norm_eps,
                 rotary_frequency, rotary_scale, slot_position, position_offset);
}

void check_decode_attention(const at::Tensor& query, const at::Tensor& key_rows, const at::Tensor& value_rows,
                            const at::Tensor& row_start, const at::Tensor& row_len, double scale,
                            const KeyTransform& transform) {
  check_float(kOp, "query", query);
  check_rank(kOp, "query", query, 4, "[B, Hq, 1, Dk]");
  UNCOMP_CHECK_VALUE(kOp, query.size(2) == 1, "query must hold one token, shape [B, Hq, 1, Dk]; got ", query.sizes());
  check_last_contiguous(kOp, "query", query);
  const int32_t num_rows = check_arena(kOp, key_rows, value_rows, row_start, row_len, query);
  UNCOMP_CHECK_VALUE(kOp, transform.given() || query.size(3) == key_rows.size(1),
                     "query must have the head dim of key_rows, ", key_rows.size(1), "; got ", query.size(3));
  const HeadLayout layout = check_head_layout(kOp, query.size(0), query.size(1), num_rows);
  check_key_transform(kOp, transform, query, key_rows, query.size(0) == 0 ? 0 : layout.rows_per_sequence);
  check_finite(kOp, "scale", scale);
}

namespace {

std::tuple<at::Tensor, at::Tensor> decode_attention_cpu(
    const at::Tensor& query, const at::Tensor& key_rows, const at::Tensor& value_rows, const at::Tensor& row_start,
    const at::Tensor& row_len, double scale, const std::optional<at::Tensor>& key_basis,
    const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& key_norm, double key_norm_eps,
    const std::optional<at::Tensor>& rotary_frequency, double rotary_scale,
    const std::optional<at::Tensor>& slot_position, const std::optional<at::Tensor>& position_offset) {
  const KeyTransform transform{key_basis,        key_bias,     key_norm,      key_norm_eps,
                               rotary_frequency, rotary_scale, slot_position, position_offset};
  check_decode_attention(query, key_rows, value_rows, row_start, row_len, scale, transform);
  const RaggedRows rows = checked_rows(kOp, row_start, row_len, key_rows.size(0));
  const int64_t batch = query.size(0), heads = query.size(1);
  at::Tensor out = at::empty({batch, heads, 1, value_rows.size(1)}, query.options());
  at::Tensor lse = at::empty({batch, heads}, query.options().dtype(at::kFloat));
  const HeadLayout layout = check_head_layout(kOp, batch, heads, rows.num_rows);
  std::optional<KeyMaker> maker;
  if (transform.given()) maker.emplace(kOp, transform, kernel_dtype(query), layout.rows_per_sequence);
  DecodeRows work(query, key_rows, value_rows, rows, layout, scale, /*extra=*/0, maker ? &*maker : nullptr);
  void* out_data = out.mutable_data_ptr();
  float* lse_data = lse.mutable_data_ptr<float>();
  work.attend([](int32_t) -> float* { return nullptr; },
              [&](int32_t row) { work.merge(row, work.pieces(row), out_data, lse_data); });
  return {out, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("decode_attention", &decode_attention_cpu); }

}  // namespace
}  // namespace uncomp
