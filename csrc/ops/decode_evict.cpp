// SPDX-License-Identifier: Apache-2.0
// decode_evict_: checks and the C++ entry.
#include "ops/decode_evict.h"

#include <torch/library.h>

#include "ops/arena.h"
#include "ops/call.h"
#include "ops/check.h"

namespace uncomp {
namespace {

constexpr const char* kOp = "decode_evict_";

/// A tensor of the new token: [B, heads, 1, dim].
void check_new(const char* name, const at::Tensor& t, at::IntArrayRef wanted, const char* shape,
               const at::Tensor& query) {
  check_same_dtype(kOp, name, t, "query", query);
  check_device(kOp, name, t, "query", query);
  check_shape(kOp, name, t, wanted, shape);
  check_last_contiguous(kOp, name, t);
  check_aligned(kOp, name, t);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> decode_evict_(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& position,
    const at::Tensor& row_start, const at::Tensor& row_len, const at::Tensor& key_rows, const at::Tensor& value_rows,
    const at::Tensor& slot_position, const at::Tensor& votes, const at::Tensor& vote_sum, const at::Tensor& vote_step,
    const at::Tensor& order, int64_t window, int64_t sink, int64_t pool, double scale, std::string_view pool_mode,
    std::string_view reduce_group, const std::optional<at::Tensor>& key_basis,
    const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& key_norm, double key_norm_eps,
    const std::optional<at::Tensor>& rotary_frequency, double rotary_scale,
    const std::optional<at::Tensor>& position_offset) {
  static const auto op = op_handle<decltype(decode_evict_)>("uncomp::decode_evict_");
  return op.call(query, key, value, position, row_start, row_len, key_rows, value_rows, slot_position, votes, vote_sum,
                 vote_step, order, window, sink, pool, scale, pool_mode, reduce_group, key_basis, key_bias, key_norm,
                 key_norm_eps, rotary_frequency, rotary_scale, position_offset);
}

DecodeEvictSizes check_decode_evict(const DecodeEvictCall& call) {
  const at::Tensor& query = call.query;
  check_float(kOp, "query", query);
  check_rank(kOp, "query", query, 4, "[B, Hq, 1, Dk]");
  check_rank(kOp, "key", call.key, 4, "[B, Hkv, 1, Dk]");
  check_rank(kOp, "value", call.value, 4, "[B, Hkv, 1, Dv]");
  check_rank(kOp, "votes", call.votes, 2, "[Wd, C]");
  const bool latents = call.transform.given();
  const int64_t batch = query.size(0), num_q_heads = query.size(1);
  const int64_t key_dim = latents ? call.key.size(3) : query.size(3);
  const int64_t num_kv_heads = call.key.size(1), value_dim = call.value.size(3), vote_window = call.votes.size(0);
  UNCOMP_CHECK_VALUE(kOp, query.size(2) == 1, "query must hold one token, [B, Hq, 1, Dk]; got ", query.sizes());
  check_last_contiguous(kOp, "query", query);
  check_aligned(kOp, "query", query);
  check_head_dim(kOp, "query", query.size(3));
  check_head_dim(kOp, "key", key_dim);
  check_head_dim(kOp, "value", value_dim);
  check_new("key", call.key, {batch, num_kv_heads, 1, key_dim}, "[B, Hkv, 1, Dk]", query);
  check_new("value", call.value, {batch, num_kv_heads, 1, value_dim}, "[B, Hkv, 1, Dv]", query);

  const int32_t num_rows = check_arena(kOp, call.key_rows, call.value_rows, call.row_start, call.row_len, query);
  const int64_t capacity = call.key_rows.size(0);
  check_shape(kOp, "key_rows", call.key_rows, {capacity, key_dim}, "[C, Dk]");
  check_shape(kOp, "value_rows", call.value_rows, {capacity, value_dim}, "[C, Dv]");
  check_int32(kOp, "position", call.position, {batch}, "[B]", "query", query);
  check_int32(kOp, "slot_position", call.slot_position, {capacity}, "[C]", "query", query);
  check_int32(kOp, "votes", call.votes, {vote_window, capacity}, "[Wd, C]", "query", query);
  check_int32(kOp, "vote_sum", call.vote_sum, {capacity}, "[C]", "query", query);
  check_int32(kOp, "vote_step", call.vote_step, {num_rows}, "[R]", "query", query);
  check_int32(kOp, "order", call.order, {capacity}, "[C]", "query", query);

  const HeadLayout layout = check_head_layout(kOp, batch, num_q_heads, num_rows);
  UNCOMP_CHECK_VALUE(kOp, num_rows == 0 || (num_kv_heads >= 1 && layout.rows_per_sequence % num_kv_heads == 0),
                     "key must have a number of heads that divides the ", layout.rows_per_sequence,
                     " rows of a sequence; got ", num_kv_heads);
  check_key_transform(kOp, call.transform, query, call.key_rows, batch == 0 ? 0 : layout.rows_per_sequence);
  UNCOMP_CHECK_VALUE(kOp, !latents || call.transform.num_kv_heads() == num_kv_heads, "key_basis must have the ",
                     num_kv_heads, " heads of key; got ", latents ? call.transform.num_kv_heads() : 0);
  UNCOMP_CHECK_VALUE(kOp, vote_window >= 1, "votes must have at least one ring row; got ", vote_window);
  UNCOMP_CHECK_LIMIT(kOp, vote_window <= kMaxVoteWindow, "votes must have at most ", kMaxVoteWindow, " ring rows; got ",
                     vote_window);
  UNCOMP_CHECK_VALUE(kOp, call.window >= 1, "window must be at least 1; got ", call.window);
  UNCOMP_CHECK_VALUE(kOp, call.sink >= 0, "sink must not be negative; got ", call.sink);
  check_pool_width(kOp, call.pool);
  check_finite(kOp, "scale", call.scale);
  check_apart(kOp,
              {{"row_len", call.row_len},
               {"key_rows", call.key_rows},
               {"value_rows", call.value_rows},
               {"slot_position", call.slot_position},
               {"votes", call.votes},
               {"vote_sum", call.vote_sum},
               {"vote_step", call.vote_step},
               {"order", call.order}},
              {{"query", call.query},
               {"key", call.key},
               {"value", call.value},
               {"position", call.position},
               {"row_start", call.row_start},
               {"key_basis", call.transform.basis},
               {"key_bias", call.transform.bias},
               {"key_norm", call.transform.norm},
               {"rotary_frequency", call.transform.frequency},
               {"position_offset", call.transform.position_offset}});
  return {num_rows,
          layout.rows_per_sequence,
          static_cast<int32_t>(num_kv_heads),
          layout.group_size,
          static_cast<int32_t>(key_dim),
          static_cast<int32_t>(value_dim),
          static_cast<int32_t>(vote_window),
          capacity,
          check_int32_size(kOp, "window", call.window),
          check_int32_size(kOp, "sink", call.sink),
          static_cast<int32_t>(call.pool),
          parse_pool(kOp, call.pool_mode),
          parse_reduce(kOp, "reduce_group", call.reduce_group, false)};
}

}  // namespace uncomp
