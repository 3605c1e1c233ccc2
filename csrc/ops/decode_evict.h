// SPDX-License-Identifier: Apache-2.0
// Contract of decode_evict_.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "core/dtype.h"
#include "ops/key_transform.h"

namespace uncomp {

/// One step of a constant-length cache: attend over the row and the new token, vote, give up one slot, overwrite it.
///
/// query         [B, Hq, 1, Dk]   float32, float16 or bfloat16; rotated. Any strides with Dk contiguous.
/// key, value    [B, Hkv, 1, Dk], [B, Hkv, 1, Dv]  the new token, dtype of query
/// position      [B]      int32   its position, tokens
/// row_start     [R + 1]  int32   slots, ascending; the room of a row is its limit. R = B * rows; row r of a sequence
///                                serves query heads r*g .. r*g + g-1, g = Hq / rows in 1 .. 16, and its new token is
///                                that of KV head r / (rows / Hkv)
/// All that follows is changed in place, contiguous:
/// row_len       [R]      int32   tokens K of a row; slots behind them are never read
/// key_rows, value_rows   [C, Dk], [C, Dv]
/// slot_position [C]      int32
/// votes         [Wd, C]  int32   ring of the last Wd steps, fixed point of core/votes.h
/// vote_sum      [C]      int32   sum over the ring, kept exact: new - old
/// vote_step     [R]      int32   any number, taken modulo Wd: the ring row that this step replaces; left as the next
///                                ring row, in 0 .. Wd - 1
/// order         [C]      int32   order[row_start + i] is the slot, counted inside the row, of the i-th token by
///                                position, i < K
/// window        newest tokens that stay, the new one among them; at least 1
/// sink          first tokens that stay
/// pool          width, odd, 1 .. 129, over candidates in position order; outside counts as -inf (max) or 0 (avg)
/// key_basis and what follows: ops/key_transform.h. With key_basis the width of key and key_rows is r, that of query D;
///               the new token is stored as its latent and attended to as the key at `position`
/// reduce_group  "mean", "sum" (stored as the mean: the same choice) or "max" over the g weights of a token
///
/// One step of a row: (1) attention over K + 1 tokens; (2) a = its weights reduced over the g heads, rounded to votes;
/// they replace the oldest ring row; (3) K < room: the new token takes slot K, K grows; (4) else the candidates are all
/// but the newest `window` of the K + 1 tokens; the smallest pooled vote_sum leaves, ties the oldest; sinks are pooled
/// but stay; (5) the new token takes that slot: K, V, position, a ring column that holds only its own vote, last place
/// in order. A row without room gives out 0, lse -inf and changes nothing.
///
/// NaN or +inf among the logits of a head makes its out and lse NaN; where a head's weight is NaN the vote is 0. If
/// every logit is -inf, out is 0, lse is -inf and the votes are 0.
///
/// Returns       out [B, Hq, 1, Dv] dtype of query; lse [B, Hq] float32, natural logarithm, over all K + 1 tokens
/// Raises        TypeError            a dtype other than listed
///               ValueError           a wrong shape, device or option, a scale that is not finite in float32, memory
///                                    shared by what is written with another argument; on CPU also row_start not
///                                    ascending inside the arena, row_len outside [0, room], room below window + sink,
///                                    order that is no permutation of 0 .. K-1; nothing is written then
///               NotImplementedError  head dim not a multiple of 8 or above 256, g > 16, Wd > 64, pool > 129; on CUDA
///                                    with key_basis also r or D not a multiple of 16, r above 128
///               On CUDA starts, lengths and order are clamped into the row; where the room is below window + sink the
///               oldest token that is no sink leaves, or the oldest of all.
/// Cost          reads K, V of the live slots once; about 20 bytes of votes and order a slot; a workspace of 4 * g
///               bytes a slot; no host sync. Bits repeat from run to run.
/// Source        docs/method.md "Decode"; truth: tests/python/reference/decode_evict.py.
std::tuple<at::Tensor, at::Tensor> decode_evict_(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& position,
    const at::Tensor& row_start, const at::Tensor& row_len, const at::Tensor& key_rows, const at::Tensor& value_rows,
    const at::Tensor& slot_position, const at::Tensor& votes, const at::Tensor& vote_sum, const at::Tensor& vote_step,
    const at::Tensor& order, int64_t window, int64_t sink, int64_t pool, double scale, std::string_view pool_mode,
    std::string_view reduce_group, const std::optional<at::Tensor>& key_basis = std::nullopt,
    const std::optional<at::Tensor>& key_bias = std::nullopt, const std::optional<at::Tensor>& key_norm = std::nullopt,
    double key_norm_eps = 0.0, const std::optional<at::Tensor>& rotary_frequency = std::nullopt,
    double rotary_scale = 1.0, const std::optional<at::Tensor>& position_offset = std::nullopt);

/// The arguments of one call, as every body receives them.
struct DecodeEvictCall {
  const at::Tensor &query, &key, &value, &position, &row_start, &row_len, &key_rows, &value_rows, &slot_position,
      &votes, &vote_sum, &vote_step, &order;
  int64_t window, sink, pool;
  double scale;
  std::string_view pool_mode, reduce_group;
  const KeyTransform& transform;
};

/// Sizes and options of a checked call.
struct DecodeEvictSizes {
  int32_t num_rows;
  int32_t rows;  // of one sequence
  int32_t num_kv_heads;
  int32_t group_size;                       // query heads of a row
  int32_t key_dim, value_dim, vote_window;  // widths of key_rows, value_rows
  int64_t capacity;                         // slots
  int32_t window, sink, pool;
  Pool pool_mode;
  Reduce reduce_group;
};

/// Raises what the contract says; called first by every body.
DecodeEvictSizes check_decode_evict(const DecodeEvictCall& call);

}  // namespace uncomp
