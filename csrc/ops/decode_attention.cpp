// SPDX-License-Identifier: Apache-2.0
// decode_attention: checks, the C++ entry and the CPU body.
#include "ops/decode_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <limits>

#include "ops/arena.h"
#include "ops/attend.h"
#include "ops/call.h"

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

/// True when all rows have one length, not 0, and one room: then they are a dense [R, n, D] view of the arena.
bool is_uniform(const RaggedRows& rows) {
  if (rows.num_rows == 0 || rows.row_len[0] == 0) return false;
  const int64_t room = rows.room(0);
  for (int32_t r = 1; r < rows.num_rows; ++r) {
    if (rows.row_len[r] != rows.row_len[0] || rows.start(r) != rows.start(0) + r * room) return false;
  }
  return true;
}

/// One call of torch's fused kernel for all rows.
std::tuple<at::Tensor, at::Tensor> attend_uniform(const at::Tensor& query, const at::Tensor& key_rows,
                                                  const at::Tensor& value_rows, const RaggedRows& rows, double scale) {
  const int64_t batch = query.size(0), heads = query.size(1), dim = query.size(3);
  const int64_t per_sequence = rows.num_rows / batch, room = rows.room(0), n = rows.row_len[0];
  const auto dense = [&](const at::Tensor& t) {
    return t.as_strided({batch, per_sequence, n, dim}, {per_sequence * room * dim, room * dim, dim, 1},
                        t.storage_offset() + rows.start(0) * dim);
  };
  const at::Tensor grouped = query.squeeze(2).unflatten(1, {per_sequence, heads / per_sequence});
  const Attended got = attend_fused(grouped, dense(key_rows), dense(value_rows), scale);
  return {got.out.reshape({batch, heads, 1, dim}).contiguous(), got.lse.reshape({batch, heads}).contiguous()};
}

std::tuple<at::Tensor, at::Tensor> decode_attention_cpu(const at::Tensor& query, const at::Tensor& key_rows,
                                                        const at::Tensor& value_rows, const at::Tensor& row_start,
                                                        const at::Tensor& row_len, double scale) {
  check_decode_attention(query, key_rows, value_rows, row_start, row_len, scale);
  const RaggedRows rows = checked_rows(kOp, row_start, row_len, key_rows.size(0));
  const int64_t batch = query.size(0), heads = query.size(1), value_dim = value_rows.size(1);
  const bool fused = key_rows.size(1) == value_dim;
  if (fused && is_uniform(rows)) return attend_uniform(query, key_rows, value_rows, rows, scale);

  at::Tensor out = at::zeros({batch, heads, 1, value_dim}, query.options());
  at::Tensor lse =
      at::full({batch, heads}, -std::numeric_limits<double>::infinity(), query.options().dtype(at::kFloat));
  if (rows.num_rows == 0) return {out, lse};
  const int64_t per_sequence = rows.num_rows / batch, group = heads / per_sequence;
  char* out_bytes = static_cast<char*>(out.mutable_data_ptr());
  float* lse_data = lse.mutable_data_ptr<float>();
  const int64_t row_bytes = group * value_dim * query.element_size();
  at::parallel_for(0, rows.num_rows, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;  // worker threads do not inherit the caller's mode
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = rows.row_len[r];
      if (n == 0) continue;
      const at::Tensor q = query.select(0, r / per_sequence).narrow(0, r % per_sequence * group, group).squeeze(1);
      const at::Tensor k = key_rows.narrow(0, rows.row_start[r], n), v = value_rows.narrow(0, rows.row_start[r], n);
      const Attended got = fused ? attend_fused(q.unsqueeze(0).unsqueeze(0), k.unsqueeze(0).unsqueeze(0),
                                                v.unsqueeze(0).unsqueeze(0), scale)
                                 : attend(q, k, v, scale);
      const at::Tensor o = got.out.to(query.scalar_type()).contiguous(), l = got.lse.contiguous();
      std::memcpy(out_bytes + r * row_bytes, o.const_data_ptr(), row_bytes);
      std::memcpy(lse_data + r * group, l.const_data_ptr(), group * sizeof(float));
    }
  });
  return {out, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("decode_attention", &decode_attention_cpu); }

}  // namespace
}  // namespace uncomp
