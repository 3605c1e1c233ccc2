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

std::tuple<at::Tensor, at::Tensor> decode_attention(const at::Tensor& query, const at::Tensor& key_rows,
                                                    const at::Tensor& value_rows, const at::Tensor& row_start,
                                                    const at::Tensor& row_len, double scale) {
  static const auto op = op_handle<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double)>(
      "uncomp::decode_attention");
  return op.call(query, key_rows, value_rows, row_start, row_len, scale);
}

void check_decode_attention(const at::Tensor& query, const at::Tensor& key_rows, const at::Tensor& value_rows,
                            const at::Tensor& row_start, const at::Tensor& row_len, double scale) {
  check_float(kOp, "query", query);
  check_rank(kOp, "query", query, 4, "[B, Hq, 1, Dk]");
  UNCOMP_CHECK_VALUE(kOp, query.size(2) == 1, "query must hold one token, shape [B, Hq, 1, Dk]; got ", query.sizes());
  check_last_contiguous(kOp, "query", query);
  const int32_t num_rows = check_arena(kOp, key_rows, value_rows, row_start, row_len, query);
  UNCOMP_CHECK_VALUE(kOp, query.size(3) == key_rows.size(1), "query must have the head dim of key_rows, ",
                     key_rows.size(1), "; got ", query.size(3));
  check_head_layout(kOp, query.size(0), query.size(1), num_rows);
  check_finite_scale(kOp, scale);
}

namespace {

std::tuple<at::Tensor, at::Tensor> decode_attention_cpu(const at::Tensor& query, const at::Tensor& key_rows,
                                                        const at::Tensor& value_rows, const at::Tensor& row_start,
                                                        const at::Tensor& row_len, double scale) {
  check_decode_attention(query, key_rows, value_rows, row_start, row_len, scale);
  const RaggedRows rows = checked_rows(kOp, row_start, row_len, key_rows.size(0));
  const int64_t batch = query.size(0), heads = query.size(1);
  at::Tensor out = at::empty({batch, heads, 1, value_rows.size(1)}, query.options());
  at::Tensor lse = at::empty({batch, heads}, query.options().dtype(at::kFloat));
  DecodeRows work(query, key_rows, value_rows, rows, check_head_layout(kOp, batch, heads, rows.num_rows), scale,
                  /*extra=*/0);
  void* out_data = out.mutable_data_ptr();
  float* lse_data = lse.mutable_data_ptr<float>();
  work.attend([](int32_t) -> float* { return nullptr; },
              [&](int32_t row) { work.merge(row, work.pieces(row), out_data, lse_data); });
  return {out, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("decode_attention", &decode_attention_cpu); }

}  // namespace
}  // namespace uncomp
