// SPDX-License-Identifier: Apache-2.0
// window_scores: checks, the C++ entry and the CPU body.
#include "ops/window_scores.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "core/ragged.h"
#include "ops/arena.h"
#include "ops/call.h"
#include "ops/check.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "window_scores";
constexpr float kInfinity = std::numeric_limits<float>::infinity();

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
  check_finite_scale(kOp, scale);
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

namespace {

/// Keys that are multiplied at once: bounds the products to about a megabyte.
int64_t keys_at_once(int64_t queries) { return std::clamp<int64_t>((1 << 18) / queries, 64, 4096); }

/// Logits of a chunk of keys, [g, W', c]; invisible ones are -inf. `visible` stays undefined where all are visible.
at::Tensor chunk_logits(const at::Tensor& query, const at::Tensor& key, int64_t begin, int64_t count, double scale,
                        at::Tensor& visible) {
  const int64_t n = key.size(0), group = query.size(0), window = query.size(1);
  const at::Tensor keys = key.narrow(0, begin, count).to(at::kFloat);
  at::Tensor logits = at::mm(query.reshape({group * window, -1}), keys.t()).mul_(scale).view({group, window, count});
  visible = at::Tensor();
  if (begin + count > n - window + 1) {
    const at::Tensor token = at::arange(n - window, n, at::kLong).unsqueeze(1);
    visible = at::arange(begin, begin + count, at::kLong).unsqueeze(0).le(token);
    logits.masked_fill_(visible.logical_not(), -kInfinity);
  }
  return logits;
}

/// One row of keys: lse [g, W'] and scores [g or 1, n] of the queries [g, W', D] that exist.
void score_row(const at::Tensor& query, const at::Tensor& key, const WindowScoresPlan& plan, double scale,
               at::Tensor lse_out, at::Tensor scores_out) {
  const int64_t n = key.size(0), group = query.size(0), window = query.size(1);
  const int64_t step = keys_at_once(group * window);
  at::Tensor lse = at::full({group, window}, -kInfinity, at::kFloat), visible;
  for (int64_t begin = 0; begin < n; begin += step) {
    const at::Tensor logits = chunk_logits(query, key, begin, std::min(step, n - begin), scale, visible);
    lse = at::logaddexp(lse, at::logsumexp(logits, {2}));
  }
  lse.masked_fill_(lse.eq(kInfinity), std::numeric_limits<float>::quiet_NaN());
  lse_out.copy_(lse);
  const int64_t wanted = std::min<int64_t>(n, plan.width);
  for (int64_t begin = 0; begin < wanted; begin += step) {
    const int64_t count = std::min(step, wanted - begin);
    at::Tensor weight = chunk_logits(query, key, begin, count, scale, visible).sub_(lse.unsqueeze(2)).exp_();
    if (visible.defined()) weight.masked_fill_(visible.logical_not(), 0.0);
    at::Tensor mass = weight.sum(1);
    if (plan.reduce_window == Reduce::mean) mass.div_(static_cast<double>(window));
    if (plan.reduce_group == Reduce::mean) mass = mass.mean(0, true);
    if (plan.reduce_group == Reduce::sum) mass = mass.sum(0, true);
    if (plan.reduce_group == Reduce::max) mass = mass.amax(0, true);
    scores_out.narrow(1, begin, count).copy_(mass);
  }
}

std::tuple<at::Tensor, at::Tensor> window_scores_cpu(const at::Tensor& query, const at::Tensor& key,
                                                     const Optional& value, const Optional& first,
                                                     const Optional& length, const Optional& row_start,
                                                     const Optional& row_len, int64_t columns, double scale,
                                                     c10::string_view reduce_window, c10::string_view reduce_group) {
  const WindowScoresPlan plan = check_window_scores(query, key, value, first, length, row_start, row_len, columns,
                                                    scale, reduce_window, reduce_group);
  RaggedRows rows{};
  ValidTokens valid{};
  if (plan.arena) {
    rows = checked_rows(kOp, *row_start, *row_len, key.size(0));
  } else {
    valid = {data_or_null<int32_t>(first), data_or_null<int32_t>(length), static_cast<int32_t>(key.size(2))};
    for (int32_t b = 0; b < plan.batch; ++b) {
      const int64_t from = valid.first == nullptr ? 0 : valid.first[b];
      UNCOMP_CHECK_VALUE(kOp, from >= 0 && from <= valid.seq_len, "first must lie in [0, ", valid.seq_len, "]; got ",
                         from, " for sequence ", b);
      const int64_t tokens = valid.length == nullptr ? 0 : valid.length[b];
      UNCOMP_CHECK_VALUE(kOp, tokens >= 0 && from + tokens <= valid.seq_len, "length must lie in [0, ",
                         valid.seq_len - from, "] behind first; got ", tokens, " for sequence ", b);
    }
  }
  const auto f32 = query.options().dtype(at::kFloat);
  at::Tensor scores = at::zeros({plan.score_rows, plan.width}, f32);
  at::Tensor lse = at::full({plan.batch, plan.num_q_heads, plan.window}, -kInfinity, f32);
  const int64_t heads_out = plan.reduce_group == Reduce::none ? plan.group_size : 1;
  at::parallel_for(0, plan.num_rows, 1, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / plan.rows_per_sequence, h = r % plan.rows_per_sequence;
      const int32_t row = static_cast<int32_t>(r), sequence = static_cast<int32_t>(b);
      const int64_t n = plan.arena ? rows.len(row) : valid.count(sequence);
      if (n == 0) continue;
      const auto live = [&](const at::Tensor& t) {
        return plan.arena ? t.narrow(0, rows.start(row), n) : t.select(0, b).select(0, h).narrow(0, valid.begin(b), n);
      };
      const int64_t missing = std::max<int64_t>(plan.window - n, 0);
      const auto of_row = [&](const at::Tensor& t) {
        return t.select(0, b).narrow(0, h * plan.group_size, plan.group_size).narrow(1, missing, plan.window - missing);
      };
      at::Tensor out = scores.narrow(0, r * heads_out, heads_out);
      score_row(of_row(query).to(at::kFloat), live(key), plan, scale, of_row(lse), out);
      if (value.has_value()) {
        const int64_t wanted = std::min<int64_t>(n, plan.width);
        const at::Tensor norm = live(*value).narrow(0, 0, wanted).to(at::kFloat).square().sum(1).sqrt_();
        out.narrow(1, 0, wanted).mul_(norm);
      }
    }
  });
  return {scores, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("window_scores", &window_scores_cpu); }

}  // namespace
}  // namespace uncomp
