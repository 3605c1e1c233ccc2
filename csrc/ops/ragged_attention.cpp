// SPDX-License-Identifier: Apache-2.0
// ragged_attention: checks, the C++ entry and the CPU body.
#include "ops/ragged_attention.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "core/query_tiles.h"
#include "ops/arena.h"
#include "ops/attend.h"
#include "ops/call.h"
#include "ops/decode_rows.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "ragged_attention";
using Optional = std::optional<at::Tensor>;

}  // namespace

std::tuple<at::Tensor, at::Tensor> ragged_attention(const at::Tensor& query, const Optional& key, const Optional& value,
                                                    const Optional& other_out, const Optional& other_lse,
                                                    const Optional& first, const Optional& length,
                                                    const at::Tensor& key_rows, const at::Tensor& value_rows,
                                                    const at::Tensor& row_start, const at::Tensor& row_len,
                                                    double scale) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const Optional&, const Optional&, const Optional&, const Optional&, const Optional&,
      const Optional&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double);
  static const auto op = op_handle<Signature>("uncomp::ragged_attention");
  return op.call(query, key, value, other_out, other_lse, first, length, key_rows, value_rows, row_start, row_len,
                 scale);
}

void check_ragged_attention(const at::Tensor& query, const Optional& key, const Optional& value,
                            const Optional& other_out, const Optional& other_lse, const Optional& first,
                            const Optional& length, const at::Tensor& key_rows, const at::Tensor& value_rows,
                            const at::Tensor& row_start, const at::Tensor& row_len, double scale) {
  check_float(kOp, "query", query);
  check_rank(kOp, "query", query, 4, "[B, Hq, T, Dk]");
  check_last_contiguous(kOp, "query", query);
  const int32_t num_rows = check_arena(kOp, key_rows, value_rows, row_start, row_len, query);
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2);
  const int64_t key_dim = key_rows.size(1), value_dim = value_rows.size(1);
  UNCOMP_CHECK_VALUE(kOp, query.size(3) == key_dim, "query must have the head dim of key_rows, ", key_dim, "; got ",
                     query.size(3));
  const HeadLayout layout = check_head_layout(kOp, batch, heads, num_rows);
  check_int32_size(kOp, "tokens times heads of a row", tokens * layout.group_size + kQueryTile);

  UNCOMP_CHECK_VALUE(kOp, key.has_value() == value.has_value(), "key and value must be given together; got only ",
                     key.has_value() ? "key" : "value");
  UNCOMP_CHECK_VALUE(kOp, other_out.has_value() == other_lse.has_value(),
                     "other_out and other_lse must be given together; got only ",
                     other_out.has_value() ? "other_out" : "other_lse");
  UNCOMP_CHECK_VALUE(kOp, !(key.has_value() && other_out.has_value()),
                     "key and value must not be given with other_out and other_lse; got both pairs");
  const auto check_like_query = [&](const char* name, const at::Tensor& t, at::IntArrayRef shape, const char* text) {
    check_device(kOp, name, t, "query", query);
    check_shape(kOp, name, t, shape, text);
    check_last_contiguous(kOp, name, t);
  };
  if (key.has_value()) {
    check_same_dtype(kOp, "key", *key, "query", query);
    check_same_dtype(kOp, "value", *value, "query", query);
    check_rank(kOp, "key", *key, 4, "[B, Hkv, T, Dk]");
    const int64_t kv_heads = key->size(1);
    UNCOMP_CHECK_VALUE(kOp, kv_heads >= 1 && layout.rows_per_sequence % kv_heads == 0,
                       "key must have a number of heads that divides the ", layout.rows_per_sequence,
                       " rows of a sequence; got ", kv_heads);
    check_like_query("key", *key, {batch, kv_heads, tokens, key_dim}, "[B, Hkv, T, Dk]");
    check_like_query("value", *value, {batch, kv_heads, tokens, value_dim}, "[B, Hkv, T, Dv]");
    check_aligned(kOp, "key", *key);
    check_aligned(kOp, "value", *value);
  }
  if (other_out.has_value()) {
    check_same_dtype(kOp, "other_out", *other_out, "query", query);
    check_dtype(kOp, "other_lse", *other_lse, at::kFloat);
    check_like_query("other_out", *other_out, {batch, heads, tokens, value_dim}, "[B, Hq, T, Dv]");
    check_device(kOp, "other_lse", *other_lse, "query", query);
    check_shape(kOp, "other_lse", *other_lse, {batch, heads, tokens}, "[B, Hq, T]");
  }
  check_int32(kOp, "first", first, {batch}, "[B]", "query", query);
  check_int32(kOp, "length", length, {batch}, "[B]", "query", query);
  check_finite(kOp, "scale", scale);
}

namespace {

/// Logits that one step may hold: 16 MB.
constexpr int64_t kMostLogits = int64_t{1} << 22;

/// The valid tokens as plain numbers, after a look at every one of them.
ValidTokens checked_tokens(const Optional& first, const Optional& length, int64_t batch, int64_t tokens) {
  const ValidTokens valid{data_or_null<int32_t>(first), data_or_null<int32_t>(length), static_cast<int32_t>(tokens)};
  for (int32_t b = 0; b < batch; ++b) {
    const int64_t begin = first.has_value() ? valid.first[b] : 0;
    UNCOMP_CHECK_VALUE(kOp, begin >= 0 && begin <= tokens, "first must lie in [0, ", tokens, "]; got ", begin);
    if (!length.has_value()) continue;
    UNCOMP_CHECK_VALUE(kOp, valid.length[b] >= 0 && begin + valid.length[b] <= tokens,
                       "length must lie in [0, T - first]; got ", valid.length[b], " for T - first = ", tokens - begin);
  }
  return valid;
}

/// One new token a sequence: what decode_attention does, and then the token itself where its key is given.
std::tuple<at::Tensor, at::Tensor> attend_one(const at::Tensor& query, const Optional& key, const Optional& value,
                                              const ValidTokens& valid, const at::Tensor& key_rows,
                                              const at::Tensor& value_rows, const RaggedRows& rows,
                                              const HeadLayout& layout, double scale) {
  at::Tensor out = at::empty({query.size(0), query.size(1), 1, value_rows.size(1)}, query.options());
  at::Tensor lse = at::empty({query.size(0), query.size(1), 1}, query.options().dtype(at::kFloat));
  // A token that is none sees nothing.
  const auto exists = [&](int32_t row) { return valid.count(row / layout.rows_per_sequence) > 0; };
  std::vector<int32_t> len(rows.num_rows);
  for (int32_t r = 0; r < rows.num_rows; ++r) len[r] = exists(r) ? rows.row_len[r] : 0;
  const RaggedRows seen{rows.row_start, len.data(), rows.capacity, rows.num_rows};
  DecodeRows work(query, key_rows, value_rows, seen, layout, scale, /*extra=*/key.has_value() ? 1 : 0);
  const auto of_row = [&](const at::Tensor& t, int32_t row) {
    const int64_t head = row % layout.rows_per_sequence / (layout.rows_per_sequence / t.size(1));
    const int64_t element = row / layout.rows_per_sequence * t.stride(0) + head * t.stride(1);
    return static_cast<const char*>(t.const_data_ptr()) + element * t.element_size();
  };
  void* out_data = out.mutable_data_ptr();
  float* lse_data = lse.mutable_data_ptr<float>();
  work.attend([](int32_t) -> float* { return nullptr; },
              [&](int32_t row) {
                const bool itself = key.has_value() && exists(row);
                float weights[kMaxGroupSize];
                if (itself) work.attend_extra(row, 0, of_row(*key, row), of_row(*value, row), weights, 1);
                work.merge(row, work.pieces(row) + (itself ? 1 : 0), out_data, lse_data);
              });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor> ragged_attention_cpu(const at::Tensor& query, const Optional& key,
                                                        const Optional& value, const Optional& other_out,
                                                        const Optional& other_lse, const Optional& first,
                                                        const Optional& length, const at::Tensor& key_rows,
                                                        const at::Tensor& value_rows, const at::Tensor& row_start,
                                                        const at::Tensor& row_len, double scale) {
  check_ragged_attention(query, key, value, other_out, other_lse, first, length, key_rows, value_rows, row_start,
                         row_len, scale);
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2);
  const RaggedRows rows = checked_rows(kOp, row_start, row_len, key_rows.size(0));
  const ValidTokens valid = checked_tokens(first, length, batch, tokens);
  const HeadLayout layout = check_head_layout(kOp, batch, heads, rows.num_rows);
  if (tokens == 1 && !other_out.has_value()) {
    return attend_one(query, key, value, valid, key_rows, value_rows, rows, layout, scale);
  }
  const auto [per_sequence, group] = layout;
  at::Tensor out = at::zeros({batch, heads, tokens, value_rows.size(1)}, query.options());
  at::Tensor lse =
      at::full({batch, heads, tokens}, -std::numeric_limits<double>::infinity(), query.options().dtype(at::kFloat));
  for (int32_t row = 0; row < rows.num_rows; ++row) {
    const int32_t b = row / per_sequence, begin = valid.begin(b), end = begin + valid.count(b);
    if (begin == end) continue;
    // The heads of this row: [g, tokens, D] views.
    const auto mine = [&](const at::Tensor& t) { return t.select(0, b).narrow(0, row % per_sequence * group, group); };
    const int64_t past = rows.row_len[row];
    const at::Tensor past_keys = key_rows.narrow(0, rows.row_start[row], past).to(at::kFloat);
    const at::Tensor past_values = value_rows.narrow(0, rows.row_start[row], past).to(at::kFloat);
    at::Tensor new_keys, new_values;
    if (key.has_value()) {
      const int64_t kv_head = row % per_sequence / (per_sequence / key->size(1));
      new_keys = key->select(0, b).select(0, kv_head).to(at::kFloat);
      new_values = value->select(0, b).select(0, kv_head).to(at::kFloat);
    }
    const int64_t step = std::max<int64_t>(kMostLogits / (group * (past + end)), 1);
    for (int64_t t = begin; t < end; t += step) {
      const int64_t n = std::min<int64_t>(step, end - t);
      const auto packed = [&](const at::Tensor& x) { return mine(x).narrow(1, t, n).flatten(0, 1); };
      Attended got = attend(packed(query), past_keys, past_values, scale);
      if (key.has_value()) {
        const int64_t seen = t + n - begin;
        const at::Tensor visible =
            at::arange(seen).unsqueeze(0).le(at::arange(t - begin, t - begin + n).unsqueeze(1)).repeat({group, 1});
        got = merge(got, attend(packed(query), new_keys.narrow(0, begin, seen), new_values.narrow(0, begin, seen),
                                scale, visible));
      } else if (other_out.has_value()) {
        got = merge(got, {packed(*other_out), packed(*other_lse)});
      }
      mine(out).narrow(1, t, n).copy_(got.out.unflatten(0, {group, n}));
      mine(lse).narrow(1, t, n).copy_(got.lse.unflatten(0, {group, n}));
    }
  }
  return {out, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("ragged_attention", &ragged_attention_cpu); }

}  // namespace
}  // namespace uncomp
