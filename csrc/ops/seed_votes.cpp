// SPDX-License-Identifier: Apache-2.0
// seed_votes_: checks, the C++ entry and the CPU body.
#include "ops/seed_votes.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "core/ragged.h"
#include "core/votes.h"
#include "cpu/loops.h"
#include "ops/arena.h"
#include "ops/call.h"
#include "ops/check.h"
#include "ops/threads.h"

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
  check_finite(kOp, "scale", scale);
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
  check_apart(kOp, {{"votes", votes}, {"vote_sum", vote_sum}, {"vote_step", vote_step}, {"order", order}},
              {{"query", query},
               {"lse", lse},
               {"query_position", query_position},
               {"key_rows", key_rows},
               {"slot_position", slot_position},
               {"row_start", row_start},
               {"row_len", row_len}});
  return plan;
}

namespace {

/// Slots that one task fills.
constexpr int32_t kChunk = 256;

/// Votes of one query on the slots of a chunk: 0 for tokens that are newer than the query. `sum` grows by them.
void hide_and_add(const int32_t* position, int32_t at, int32_t count, int32_t* vote, int32_t* sum) {
  for (int32_t j = 0; j < count; ++j) {
    vote[j] = position[j] <= at ? vote[j] : 0;
    sum[j] += vote[j];
  }
}

void seed_votes_cpu(const at::Tensor& query, const at::Tensor& lse, const at::Tensor& query_position,
                    const at::Tensor& key_rows, const at::Tensor& slot_position, const at::Tensor& row_start,
                    const at::Tensor& row_len, at::Tensor& votes, at::Tensor& vote_sum, at::Tensor& vote_step,
                    at::Tensor& order, double scale, c10::string_view reduce_group) {
  const SeedVotesPlan plan = check_seed_votes(query, lse, query_position, key_rows, slot_position, row_start, row_len,
                                              votes, vote_sum, vote_step, order, scale, reduce_group);
  const int64_t capacity = key_rows.size(0), missing = plan.window - plan.vote_window;
  const RaggedRows rows = checked_rows(kOp, row_start, row_len, capacity);
  // The voters alone, so that those of a row lie together: [B, Hq, Wd, D] and [B, Hq, Wd].
  const at::Tensor voters = query.narrow(2, missing, plan.vote_window).to(at::kFloat).contiguous();
  const at::Tensor offsets = lse.narrow(2, missing, plan.vote_window).contiguous();
  const int32_t bits = vote_scale_bits(plan.vote_window), queries = plan.group_size * plan.vote_window;
  const int32_t* position = slot_position.const_data_ptr<int32_t>();
  const int32_t* query_at = query_position.const_data_ptr<int32_t>();
  int32_t* vote = votes.mutable_data_ptr<int32_t>();
  int32_t* sum = vote_sum.mutable_data_ptr<int32_t>();
  int32_t* rank = order.mutable_data_ptr<int32_t>();
  std::fill_n(vote_step.mutable_data_ptr<int32_t>(), vote_step.numel(), 0);

  const std::vector<RowPart> chunks = row_parts(plan.num_rows, kChunk, [&](int32_t r) { return rows.room(r); });
  int64_t live = 0;
  for (int32_t r = 0; r < plan.num_rows; ++r) live += rows.len(r);
  const int64_t tasks = static_cast<int64_t>(chunks.size());
  const int64_t threads = shared_by(tasks, threads_for(live * plan.head_dim * ceil_div(queries, 4)));
  const int64_t weights = int64_t{queries} * kChunk, scratch_floats = weights + cpu::kKeyTile * plan.head_dim;
  const at::Tensor scratch = at::empty({threads * scratch_floats}, voters.options());
  float* of_threads = scratch.mutable_data_ptr<float>();
  const cpu::Loops& loops = cpu::loops();
  const cpu::OfDType& of_dtype = loops[kernel_dtype(query)];
  const char* keys = static_cast<const char*>(key_rows.const_data_ptr());
  const float* all_queries = voters.const_data_ptr<float>();
  const float* all_offsets = offsets.const_data_ptr<float>();
  const std::vector<float> ones(plan.group_size, 1.0f);

  share(tasks, threads, [&](int64_t task, int64_t thread) {
    const RowPart& chunk = chunks[task];
    const int64_t slot = rows.start(chunk.row) + chunk.first;
    const int32_t len = rows.len(chunk.row), count = std::clamp(len - chunk.first, 0, chunk.count);
    for (int32_t j = 0; j < chunk.count; ++j) rank[slot + j] = j < count ? chunk.first + j : 0;
    std::fill_n(sum + slot, chunk.count, 0);
    float* weight = of_threads + thread * scratch_floats;
    if (count > 0) {
      of_dtype.logits({all_queries + int64_t{chunk.row} * queries * plan.head_dim,
                       keys + slot * key_rows.stride(0) * key_rows.element_size(), key_rows.stride(0), queries, count,
                       plan.head_dim, static_cast<float>(scale), weight, kChunk, weight + weights});
    }
    const int32_t* at = query_at + int64_t{chunk.row / plan.rows_per_sequence} * plan.window + missing;
    for (int32_t i = 0; i < plan.vote_window; ++i) {
      int32_t* of_query = vote + i * capacity + slot;
      std::fill_n(of_query + count, chunk.count - count, 0);
      if (at[i] < 0 || count == 0) {
        std::fill_n(of_query, count, 0);
        continue;
      }
      for (int32_t h = 0; h < plan.group_size; ++h) {
        float* of_head = weight + (int64_t{h} * plan.vote_window + i) * kChunk;
        const float offset = all_offsets[int64_t{chunk.row} * queries + h * plan.vote_window + i];
        loops.exp_minus(of_head, offset, count, of_head);
      }
      loops.votes({weight + int64_t{i} * kChunk, int64_t{plan.vote_window} * kChunk, ones.data(), plan.group_size,
                   count, bits, plan.reduce_group == Reduce::max, of_query});
      hide_and_add(position + slot, at[i], count, of_query, sum + slot);
    }
  });
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("seed_votes_", &seed_votes_cpu); }

}  // namespace
}  // namespace uncomp
