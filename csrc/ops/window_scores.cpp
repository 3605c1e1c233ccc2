// SPDX-License-Identifier: Apache-2.0
// window_scores: checks and the C++ entry.
#include "ops/window_scores.h"

#include <torch/library.h>

#include "ops/arena.h"
#include "ops/call.h"
#include "ops/check.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "window_scores";

using Optional = std::optional<at::Tensor>;

}  // namespace

std::tuple<at::Tensor, at::Tensor> window_scores(const at::Tensor& query, const at::Tensor& key, const Optional& value,
                                                 const Optional& first, const Optional& length,
                                                 const Optional& row_start, const Optional& row_len, int64_t columns,
                                                 double scale, std::string_view reduce_window,
                                                 std::string_view reduce_group) {
  static const auto op = op_handle<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const Optional&, const Optional&, const Optional&, const Optional&,
      const Optional&, int64_t, double, c10::string_view, c10::string_view)>("uncomp::window_scores");
  return op.call(query, key, value, first, length, row_start, row_len, columns, scale, reduce_window, reduce_group);
}

WindowScoresPlan check_window_scores(const at::Tensor& query, const at::Tensor& key, const Optional& value,
                                     const Optional& first, const Optional& length, const Optional& row_start,
                                     const Optional& row_len, int64_t columns, double scale,
                                     std::string_view reduce_window, std::string_view reduce_group) {
  check_float(kOp, "query", query);
  check_rank(kOp, "query", query, 4, "[B, Hq, W, D]");
  const int64_t batch = query.size(0), heads = query.size(1), window = query.size(2), dim = query.size(3);
  check_head_dim(kOp, "query", dim);
  UNCOMP_CHECK_VALUE(kOp, window >= 1, "query must have at least one window query; got ", window);
  UNCOMP_CHECK_LIMIT(kOp, window <= kMaxWindow, "query must have at most ", kMaxWindow, " window queries; got ",
                     window);
  check_finite(kOp, "scale", scale);
  WindowScoresPlan plan{};
  plan.reduce_window = parse_reduce(kOp, "reduce_window", reduce_window, false);
  UNCOMP_CHECK_VALUE(kOp, plan.reduce_window != Reduce::max, "reduce_window must be \"mean\" or \"sum\"; got \"max\"");
  plan.reduce_group = parse_reduce(kOp, "reduce_group", reduce_group, true);

  // One layout or the other.
  UNCOMP_CHECK_VALUE(kOp, row_start.has_value() == row_len.has_value(),
                     "row_start and row_len must be given together; got only ",
                     row_start.has_value() ? "row_start" : "row_len");
  plan.arena = row_start.has_value();
  const auto check_tokens = [&](const char* name, const at::Tensor& t) {
    check_same_dtype(kOp, name, t, "query", query);
    check_device(kOp, name, t, "query", query);
    check_rank(kOp, name, t, plan.arena ? 2 : 4, plan.arena ? "[C, D]" : "[B, Hkv, S, D]");
    check_head_dim(kOp, name, t.size(-1));
    check_last_contiguous(kOp, name, t);
    if (t.is_cuda()) check_aligned(kOp, name, t);
  };
  check_tokens("key", key);
  UNCOMP_CHECK_VALUE(kOp, key.size(-1) == dim, "key must have the head dim of query (", dim, "); got ", key.size(-1));
  check_last_contiguous(kOp, "query", query);
  if (query.is_cuda()) check_aligned(kOp, "query", query);
  if (value.has_value()) {
    check_tokens("value", *value);
    UNCOMP_CHECK_VALUE(kOp, value->sizes().slice(0, key.dim() - 1) == key.sizes().slice(0, key.dim() - 1),
                       "value must have the tokens of key (", key.sizes(), "); got ", value->sizes());
  }
  const int64_t tokens = key.size(-2);
  UNCOMP_CHECK_LIMIT(kOp, tokens < (int64_t{1} << 30), "key must have fewer than 2^30 tokens; got ", tokens);
  int64_t rows = 0;
  if (plan.arena) {
    UNCOMP_CHECK_VALUE(kOp, !first.has_value() && !length.has_value(),
                       "first and length belong to a dense key; rows of an arena have row_start and row_len");
    UNCOMP_CHECK_VALUE(kOp, columns >= 1, "columns must be at least 1 for an arena; got ", columns);
    check_rank(kOp, "row_len", *row_len, 1, "[R]");
    rows = row_len->size(0);
    check_int32(kOp, "row_len", *row_len, {rows}, "[R]", "query", query);
    check_int32(kOp, "row_start", *row_start, {rows + 1}, "[R + 1]", "query", query);
  } else {
    UNCOMP_CHECK_VALUE(kOp, key.size(0) == batch, "key must have ", batch, " sequences like query; got ", key.size(0));
    UNCOMP_CHECK_VALUE(kOp, columns == 0, "columns must be 0 for a dense key, whose width is that of the scores; got ",
                       columns);
    check_int32(kOp, "first", first, {batch}, "[B]", "query", query);
    check_int32(kOp, "length", length, {batch}, "[B]", "query", query);
    UNCOMP_CHECK_VALUE(kOp, key.size(1) >= 1 && heads % key.size(1) == 0, "query must have a multiple of the ",
                       key.size(1), " heads of key as its heads; got ", heads);
    rows = batch * key.size(1);
  }
  const HeadLayout layout = check_head_layout(kOp, batch, heads, rows);
  plan.rows_per_sequence = batch == 0 && !plan.arena ? static_cast<int32_t>(key.size(1)) : layout.rows_per_sequence;
  plan.group_size = layout.group_size;
  UNCOMP_CHECK_VALUE(kOp, plan.reduce_group != Reduce::none || !plan.arena || plan.group_size == 1,
                     "row_len must have a row for each of the ", batch * heads,
                     " query heads with reduce_group \"none\"; got ", rows);
  plan.batch = check_int32_size(kOp, "sequences", batch);
  plan.num_q_heads = check_int32_size(kOp, "heads", heads);
  plan.window = static_cast<int32_t>(window);
  plan.head_dim = static_cast<int32_t>(dim);
  plan.num_rows = check_int32_size(kOp, "rows", rows);
  plan.score_rows = check_int32_size(kOp, "rows of scores", plan.reduce_group == Reduce::none ? batch * heads : rows);
  plan.width = check_int32_size(kOp, "columns", plan.arena ? columns : tokens);
  UNCOMP_CHECK_LIMIT(kOp, plan.width < (int32_t{1} << 30), "columns must be below 2^30; got ", plan.width);
  return plan;
}

}  // namespace uncomp
