// SPDX-License-Identifier: Apache-2.0
// decode_evict_: CPU body. Rows are independent; each runs the five steps of the contract in order.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "core/eviction.h"
#include "core/ragged.h"
#include "core/votes.h"
#include "cpu/loops.h"
#include "ops/arena.h"
#include "ops/decode_evict.h"
#include "ops/decode_rows.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "decode_evict_";

struct State {
  RaggedRows rows;
  int32_t *row_len, *slot_position, *votes, *vote_sum, *vote_step, *order;
};

/// What only the data can violate beyond the layout of rows, looked at before anything is written.
void check_data(const DecodeEvictSizes& sizes, const State& state) {
  std::vector<char> seen;
  for (int32_t r = 0; r < sizes.num_rows; ++r) {
    const int64_t start = state.rows.start(r), room = state.rows.room(r);
    const int32_t len = state.rows.len(r);
    const int64_t least = int64_t{sizes.window} + sizes.sink;
    UNCOMP_CHECK_VALUE(kOp, room == 0 || room >= least,
                       "the room of a row must be 0 or at least window + sink = ", least, "; got ", room, " at row ",
                       r);
    const int32_t* order = state.order + start;
    seen.assign(len, 0);
    bool inside = true;
    for (int32_t i = 0; i < len; ++i) {
      const bool valid = static_cast<uint32_t>(order[i]) < static_cast<uint32_t>(len);
      inside = inside && valid;
      seen[valid ? order[i] : 0] = 1;
    }
    // len slots, each of them seen: a permutation.
    if (inside && std::memchr(seen.data(), 0, len) == nullptr) continue;
    seen.assign(len, 0);
    for (int32_t i = 0; i < len; ++i) {
      const int32_t slot = order[i];
      const bool fresh = slot >= 0 && slot < len && !seen[slot];
      UNCOMP_CHECK_VALUE(kOp, fresh, "order must hold every slot 0 .. ", len - 1, " of row ", r, " once; got ", slot,
                         " at place ", i);
      seen[slot] = 1;
    }
  }
}

/// Step 4: place in position order of the token that leaves.
int32_t choose_leaver(const EvictStep& step, const int32_t* order, const int32_t* vote_sum, int32_t pool, Pool mode) {
  std::vector<int32_t> sum(step.candidates), scratch(step.candidates);
  for (int32_t i = 0; i < step.candidates; ++i) sum[i] = vote_sum[order[i]];
  return cpu::loops().smallest_pooled(sum.data(), step.candidates, step.first, pool, mode, scratch.data());
}

/// Steps 2 to 5 on the integers of a row, from the `vote` of each of its K + 1 tokens; returns the slot of the new one.
int32_t vote_and_choose(const DecodeEvictSizes& sizes, const State& state, int32_t r, const EvictStep& step,
                        const int32_t* vote) {
  const int64_t start = state.rows.start(r);
  const int32_t ring_row = vote_ring_row(state.vote_step[r], sizes.vote_window), len = step.len;
  int32_t* sum = state.vote_sum + start;
  int32_t* order = state.order + start;
  cpu::loops().turn_ring(vote, len, state.votes + ring_row * sizes.capacity + start, sum);
  int32_t slot = len;
  if (step.kind == EvictStep::Kind::append) {
    order[len] = slot;
    state.row_len[r] = len + 1;
  } else {
    const int32_t place = choose_leaver(step, order, sum, sizes.pool, sizes.pool_mode);
    slot = order[place];
    std::memmove(order + place, order + place + 1, sizeof(int32_t) * (len - 1 - place));
    order[len - 1] = slot;
  }
  const int32_t own = vote[len];
  for (int32_t w = 0; w < sizes.vote_window; ++w) {
    state.votes[w * sizes.capacity + start + slot] = w == ring_row ? own : 0;
  }
  sum[slot] = own;
  state.vote_step[r] = vote_ring_row(ring_row + 1, sizes.vote_window);
  return slot;
}

/// Votes of all K + 1 tokens of a row from the weights that its pieces left, and at last that of the new token.
std::vector<int32_t> row_votes(const DecodeEvictSizes& sizes, const DecodeRows& work, int32_t row,
                               const float* weights) {
  const int64_t stride = work.weight_stride(row);
  std::vector<int32_t> vote(stride);
  const int32_t pieces = work.pieces(row), bits = vote_scale_bits(sizes.vote_window);
  for (int32_t i = 0; i <= pieces; ++i) {
    const int32_t first = i < pieces ? work.piece(row, i).first : static_cast<int32_t>(stride) - 1;
    const int32_t count = i < pieces ? work.piece(row, i).end - first : 1;
    cpu::loops().votes({weights + first, stride, work.factors(row, i), sizes.group_size, count, bits,
                        sizes.reduce_group == Reduce::max, vote.data() + first});
  }
  return vote;
}

/// The step of all rows. Nothing of the state is written before the attention of the row is done.
void step_rows(const DecodeEvictCall& call, const DecodeEvictSizes& sizes, const State& state, const KeyMaker* maker,
               void* out, float* lse) {
  const HeadLayout layout{sizes.rows, sizes.group_size};
  // The attention sees the lengths before the step, whatever the steps of other rows write.
  const std::vector<int32_t> len(state.row_len, state.row_len + sizes.num_rows);
  const RaggedRows before{state.rows.row_start, len.data(), sizes.capacity, sizes.num_rows};
  DecodeRows work(call.query, call.key_rows, call.value_rows, before, layout, call.scale, /*extra=*/1, maker);

  std::vector<int64_t> first_weight(sizes.num_rows + 1, 0);
  for (int32_t r = 0; r < sizes.num_rows; ++r) {
    first_weight[r + 1] = first_weight[r] + work.weight_stride(r) * sizes.group_size;
  }
  const at::Tensor workspace = at::empty({first_weight.back()}, call.query.options().dtype(at::kFloat));
  float* weights = workspace.mutable_data_ptr<float>();
  char* key_rows = static_cast<char*>(call.key_rows.mutable_data_ptr());
  char* value_rows = static_cast<char*>(call.value_rows.mutable_data_ptr());
  const char* keys = static_cast<const char*>(call.key.const_data_ptr());
  const char* values = static_cast<const char*>(call.value.const_data_ptr());
  const int32_t* position = call.position.const_data_ptr<int32_t>();
  const int64_t element = call.key_rows.element_size();
  const int64_t key_bytes = sizes.key_dim * element, value_bytes = sizes.value_dim * element;

  const auto finish = [&](int32_t r) {
    const EvictStep step = evict_step(len[r], before.room(r), sizes.window, sizes.sink);
    if (step.kind == EvictStep::Kind::nothing) return work.merge(r, work.pieces(r), out, lse);
    const int64_t b = r / sizes.rows, kv_head = r % sizes.rows / (sizes.rows / sizes.num_kv_heads);
    const char* key = keys + (b * call.key.stride(0) + kv_head * call.key.stride(1)) * element;
    const char* value = values + (b * call.value.stride(0) + kv_head * call.value.stride(1)) * element;
    float* of_row = weights + first_weight[r];
    work.attend_extra(r, 0, key, value, of_row + step.len, work.weight_stride(r), position + b);
    work.merge(r, work.pieces(r) + 1, out, lse);
    const std::vector<int32_t> vote = row_votes(sizes, work, r, of_row);
    const int64_t slot = before.start(r) + vote_and_choose(sizes, state, r, step, vote.data());
    std::memcpy(key_rows + slot * key_bytes, key, key_bytes);
    std::memcpy(value_rows + slot * value_bytes, value, value_bytes);
    state.slot_position[slot] = position[b];
  };
  work.attend([&](int32_t r) { return weights + first_weight[r]; }, finish);
}

std::tuple<at::Tensor, at::Tensor> decode_evict_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& position,
    const at::Tensor& row_start, const at::Tensor& row_len, const at::Tensor& key_rows, const at::Tensor& value_rows,
    const at::Tensor& slot_position, const at::Tensor& votes, const at::Tensor& vote_sum, const at::Tensor& vote_step,
    const at::Tensor& order, int64_t window, int64_t sink, int64_t pool, double scale, std::string_view pool_mode,
    std::string_view reduce_group, const std::optional<at::Tensor>& key_basis,
    const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& key_norm, double key_norm_eps,
    const std::optional<at::Tensor>& rotary_frequency, double rotary_scale,
    const std::optional<at::Tensor>& position_offset) {
  const std::optional<at::Tensor> slots = slot_position;
  const KeyTransform transform{key_basis,        key_bias,     key_norm, key_norm_eps,
                               rotary_frequency, rotary_scale, slots,    position_offset};
  const DecodeEvictCall call{query,      key,           value, position,  row_start,    row_len,  key_rows,
                             value_rows, slot_position, votes, vote_sum,  vote_step,    order,    window,
                             sink,       pool,          scale, pool_mode, reduce_group, transform};
  const DecodeEvictSizes sizes = check_decode_evict(call);
  const RaggedRows rows = checked_rows(kOp, row_start, row_len, sizes.capacity);
  const State state{rows,
                    row_len.mutable_data_ptr<int32_t>(),
                    slot_position.mutable_data_ptr<int32_t>(),
                    votes.mutable_data_ptr<int32_t>(),
                    vote_sum.mutable_data_ptr<int32_t>(),
                    vote_step.mutable_data_ptr<int32_t>(),
                    order.mutable_data_ptr<int32_t>()};
  check_data(sizes, state);
  std::optional<KeyMaker> maker;
  if (transform.given()) maker.emplace(kOp, transform, kernel_dtype(query), sizes.rows);
  at::Tensor out = at::empty({query.size(0), query.size(1), 1, sizes.value_dim}, query.options());
  at::Tensor lse = at::empty({query.size(0), query.size(1)}, query.options().dtype(at::kFloat));
  step_rows(call, sizes, state, maker ? &*maker : nullptr, out.mutable_data_ptr(), lse.mutable_data_ptr<float>());
  return {out, lse};
}

TORCH_LIBRARY_IMPL(uncomp, CPU, m) { m.impl("decode_evict_", &decode_evict_cpu); }

}  // namespace
}  // namespace uncomp
