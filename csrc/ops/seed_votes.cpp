// SPDX-License-Identifier: Apache-2.0
// seed_votes_: checks, the C++ entry and the CPU body.
#include "ops/seed_votes.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "core/ragged.h"
#include "core/votes.h"
#include "ops/arena.h"
#include "ops/call.h"
#include "ops/check.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "seed_votes_";

}  // namespace

void seed_votes_(const at::Tensor& query, const at::Tensor& lse, const at::Tensor& query_position,
                 const at::Tensor& key_rows, const at::Tensor& slot_position, const at::Tensor& row_start,
                 const at::Tensor& row_len, at::Tensor votes, at::Tensor vote_sum, at::Tensor vote_step,
                 at::Tensor order, double scale, std::string_view reduce_group) {
  static const auto op =
      op_handle<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                     const at::Tensor&, const at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, double,
                     c10::string_view)>("uncomp::seed_votes_");
  op.call(query, lse, query_position, key_rows, slot_position, row_start, row_len, votes, vote_sum, vote_step, order,
          scale, reduce_group);
}

SeedVotesPlan check_seed_votes(const at::Tensor& query, const at::Tensor& lse, const at::Tensor& query_position,
                               const at::Tensor& key_rows, const at::Tensor& slot_position, const at::Tensor& row_start,
                               const at::Tensor& row_len, const at::Tensor& votes, const at::Tensor& vote_sum,
                               const at::Tensor& vote_step, const at::Tensor& order, double scale,
                               std::string_view reduce_group) {
  check_float(kOp, "query", query);
  check_rank(kOp, "query", query, 4, "[B, Hq, W, D]");
  const int64_t batch = query.size(0), heads = query.size(1), window = query.size(2), dim = query.size(3);
  check_head_dim(kOp, "query", dim);
  check_last_contiguous(kOp, "query", query);
  UNCOMP_CHECK_VALUE(kOp, window >= 1, "query must have at least one window query; got ", window);
  UNCOMP_CHECK_LIMIT(kOp, window <= kMaxWindow, "query must have at most ", kMaxWindow, " window queries; got ",
                     window);
  check_finite_scale(kOp, scale);
  const Reduce reduce = parse_reduce(kOp, "reduce_group", reduce_group, false);
  check_dtype(kOp, "lse", lse, at::kFloat);
  check_device(kOp, "lse", lse, "query", query);
  check_shape(kOp, "lse", lse, {batch, heads, window}, "[B, Hq, W]");
  check_contiguous(kOp, "lse", lse);
  check_int32(kOp, "query_position", query_position, {batch, window}, "[B, W]", "query", query);

  check_same_dtype(kOp, "key_rows", key_rows, "query", query);
  check_device(kOp, "key_rows", key_rows, "query", query);
  check_rank(kOp, "key_rows", key_rows, 2, "[C, D]");
  UNCOMP_CHECK_VALUE(kOp, key_rows.size(1) == dim, "key_rows must have the head dim of query (", dim, "); got ",
                     key_rows.size(1));
  check_last_contiguous(kOp, "key_rows", key_rows);
  if (query.is_cuda()) {
    check_aligned(kOp, "query", query);
    check_aligned(kOp, "key_rows", key_rows);
  }
  const int64_t capacity = key_rows.size(0);
  UNCOMP_CHECK_LIMIT(kOp, capacity < (int64_t{1} << 30), "key_rows must have fewer than 2^30 slots; got ", capacity);
  check_rank(kOp, "row_len", row_len, 1, "[R]");
  const int64_t rows = row_len.size(0);
  check_int32(kOp, "slot_position", slot_position, {capacity}, "[C]", "query", query);
  check_int32(kOp, "row_start", row_start, {rows + 1}, "[R + 1]", "query", query);
  check_int32(kOp, "row_len", row_len, {rows}, "[R]", "query", query);
  const HeadLayout layout = check_head_layout(kOp, batch, heads, rows);

  check_rank(kOp, "votes", votes, 2, "[Wd, C]");
  const int64_t vote_window = votes.size(0);
  UNCOMP_CHECK_VALUE(kOp, vote_window >= 1 && vote_window <= window, "votes must have 1 to W = ", window, " rows; got ",
                     vote_window);
  check_int32(kOp, "votes", votes, {vote_window, capacity}, "[Wd, C]", "query", query);
  check_int32(kOp, "vote_sum", vote_sum, {capacity}, "[C]", "query", query);
  check_int32(kOp, "vote_step", vote_step, {rows}, "[R]", "query", query);
  check_int32(kOp, "order", order, {capacity}, "[C]", "query", query);
  static_assert(kMaxWindow <= kMaxVoteWindow);

  SeedVotesPlan plan{};
  plan.batch = check_int32_size(kOp, "sequences", batch);
  plan.window = static_cast<int32_t>(window);
  plan.vote_window = static_cast<int32_t>(vote_window);
  plan.head_dim = static_cast<int32_t>(dim);
  plan.num_rows = check_int32_size(kOp, "rows", rows);
  plan.rows_per_sequence = layout.rows_per_sequence;
  plan.group_size = layout.group_size;
  plan.reduce_group = reduce == Reduce::sum ? Reduce::mean : reduce;
  check_apart(kOp, {{"key_rows", key_rows},
                    {"slot_position", slot_position},
                    {"row_start", row_start},
                    {"row_len", row_len},
                    {"votes", votes},
                    {"vote_sum", vote_sum},
                    {"vote_step", vote_step},
                    {"order", order}});
  return plan;
}

namespace {

/// Weights of the voting queries on a row's live keys, reduced over its heads: [Wd, len].
at::Tensor row_weights(const at::Tensor& query, const at::Tensor& lse, const at::Tensor& keys, double scale,
                       Reduce reduce) {
  const int64_t group = query.size(0), vote_window = query.size(1);
  const at::Tensor packed = query.to(at::kFloat).reshape({group * vote_window, -1});
  const at::Tensor weight = at::mm(packed, keys.to(at::kFloat).t())
                                .mul_(scale)
                                .view({group, vote_window, keys.size(0)})
                                .sub_(lse.unsqueeze(2))
                                .exp_();
  return (reduce == Reduce::max ? weight.amax(0) : weight.mean(0)).contiguous();
}

void seed_votes_cpu(const at::Tensor& query, const at::Tensor& lse, const at::Tensor& query_position,
                    const at::Tensor& key_rows, const at::Tensor& slot_position, const at::Tensor& row_start,
                    const at::Tensor& row_len, at::Tensor& votes, at::Tensor& vote_sum, at::Tensor& vote_step,
                    at::Tensor& order, double scale, c10::string_view reduce_group) {
  const SeedVotesPlan plan = check_seed_votes(query, lse, query_position, key_rows, slot_position, row_start, row_len,
                                              votes, vote_sum, vote_step, order, scale, reduce_group);
  const int64_t capacity = key_rows.size(0), missing = plan.window - plan.vote_window;
  const RaggedRows rows = checked_rows(kOp, row_start, row_len, capacity);
  const int32_t bits = vote_scale_bits(plan.vote_window);
  const int32_t* position = slot_position.const_data_ptr<int32_t>();
  const int32_t* query_at = query_position.const_data_ptr<int32_t>();
  int32_t* vote = votes.mutable_data_ptr<int32_t>();
  int32_t* sum = vote_sum.mutable_data_ptr<int32_t>();
  int32_t* rank = order.mutable_data_ptr<int32_t>();
  std::fill_n(vote_step.mutable_data_ptr<int32_t>(), vote_step.numel(), 0);
  at::parallel_for(0, plan.num_rows, 1, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    for (int64_t r = begin; r < end; ++r) {
      const int32_t row = static_cast<int32_t>(r), room = rows.room(row), len = rows.len(row);
      const int64_t start = rows.start(row), b = r / plan.rows_per_sequence, h = r % plan.rows_per_sequence;
      for (int32_t i = 0; i < room; ++i) rank[start + i] = i < len ? i : 0;
      std::fill_n(sum + start, room, 0);
      for (int32_t i = 0; i < plan.vote_window; ++i) std::fill_n(vote + i * capacity + start, room, 0);
      if (len == 0) continue;
      const auto voters = [&](const at::Tensor& t) {
        return t.select(0, b).narrow(0, h * plan.group_size, plan.group_size).narrow(1, missing, plan.vote_window);
      };
      const at::Tensor weight =
          row_weights(voters(query), voters(lse), key_rows.narrow(0, start, len), scale, plan.reduce_group);
      const float* of_query = weight.const_data_ptr<float>();
      for (int32_t i = 0; i < plan.vote_window; ++i, of_query += len) {
        const int32_t at = query_at[b * plan.window + missing + i];
        for (int32_t j = 0; j < len; ++j) {
          const bool sees = at >= 0 && position[start + j] <= at;
          const int32_t value = sees ? quantize_vote(of_query[j], bits) : 0;
          vote[i * capacity + start + j] = value;
          sum[start + j] += value;
        }
      }
    }
  });
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("seed_votes_", &seed_votes_cpu); }

}  // namespace
}  // namespace uncomp
