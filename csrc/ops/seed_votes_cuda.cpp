// SPDX-License-Identifier: Apache-2.0
// seed_votes_: CUDA body.
#include <torch/library.h>

#include "kernels/window_scores/seed_votes.h"
#include "ops/check.h"
#include "ops/seed_votes.h"
#include "ops/stream.h"

namespace uncomp {
namespace {

void seed_votes_cuda(const at::Tensor& query, const at::Tensor& lse, const at::Tensor& query_position,
                     const at::Tensor& key_rows, const at::Tensor& slot_position, const at::Tensor& row_start,
                     const at::Tensor& row_len, at::Tensor& votes, at::Tensor& vote_sum, at::Tensor& vote_step,
                     at::Tensor& order, double scale, c10::string_view reduce_group) {
  const SeedVotesPlan plan = check_seed_votes(query, lse, query_position, key_rows, slot_position, row_start, row_len,
                                              votes, vote_sum, vote_step, order, scale, reduce_group);
  const CudaScope scope(query);
  kernels::SeedVotesParams params{};
  params.query = query.const_data_ptr();
  params.lse = lse.const_data_ptr<float>();
  params.query_position = query_position.const_data_ptr<int32_t>();
  params.key = key_rows.const_data_ptr();
  params.slot_position = slot_position.const_data_ptr<int32_t>();
  params.rows.arena = {row_start.const_data_ptr<int32_t>(), row_len.const_data_ptr<int32_t>(), key_rows.size(0),
                       plan.num_rows};
  params.rows.rows_per_sequence = plan.rows_per_sequence;
  params.query_stride = {query.stride(0), query.stride(1), query.stride(2)};
  params.key_stride = key_rows.stride(0);
  params.votes = votes.mutable_data_ptr<int32_t>();
  params.vote_sum = vote_sum.mutable_data_ptr<int32_t>();
  params.vote_step = vote_step.mutable_data_ptr<int32_t>();
  params.order = order.mutable_data_ptr<int32_t>();
  params.num_q_heads = static_cast<int32_t>(query.size(1));
  params.window = plan.window;
  params.vote_window = plan.vote_window;
  params.head_dim = plan.head_dim;
  params.num_rows = plan.num_rows;
  params.group_size = plan.group_size;
  params.scale = static_cast<float>(scale);
  params.reduce_group = plan.reduce_group;
  params.dtype = kernel_dtype(query);
  check_launch("seed_votes_", kernels::seed_votes(params, scope.stream()));
}

TORCH_LIBRARY_IMPL(uncomp, CUDA, m) { m.impl("seed_votes_", &seed_votes_cuda); }

}  // namespace
}  // namespace uncomp
