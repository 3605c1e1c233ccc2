// SPDX-License-Identifier: Apache-2.0
// Contract of ragged_attention.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace uncomp {

/// Attention of several new tokens (next turn, next chunk, draft) over the live slots of their cache rows and,
/// causally, over each other.
///
/// query       [B, Hq, T, Dk]   rotated; any strides with Dk contiguous
/// key, value  [B, Hkv, T, D]   the new tokens: token t sees the valid ones up to itself. Both or neither; any strides
///                              with D contiguous and rows on 16-byte borders. A row r % rows uses head
///                              (r % rows) / (rows / Hkv)
/// other_out   [B, Hq, T, Dv]   attention over other keys, computed elsewhere, to be joined with this one; in place of
/// other_lse   [B, Hq, T] fp32  key and value. Both or neither; natural log; any strides with Dv contiguous
/// first       [B] int32        first valid one of the T tokens; default 0
/// length      [B] int32        valid tokens; default all that follow `first`
/// key_rows .. row_len, scale   the past, as in decode_attention
///
/// Returns  out [B, Hq, T, Dv] in the dtype of query; lse [B, Hq, T] float32, natural log. A token that is not valid or
///          sees nothing gives 0 and -inf. NaN and infinity as in decode_attention; in `value` they may also reach
///          earlier tokens of the head, to which they have weight 0.
/// Raises   TypeError            as decode_attention; also key, value or other_out not of the dtype of query, other_lse
///                               not float32, first or length not int32
///          ValueError           as decode_attention; also one of a pair without the other, both pairs at once, rows
///          that
///                               are not a multiple of Hkv; on CPU first and length outside the tensor
///          NotImplementedError  as decode_attention
///          On CUDA lengths are clamped into the row's room, valid tokens into the tensor.
/// Cost     2 * T * Hq * (live tokens + T / 2) * (Dk + Dv) flops; no host sync; bitwise repeatable.
/// Source   docs/method.md "Decode", further tokens; truth: tests/python/reference/ragged_attention.py.
std::tuple<at::Tensor, at::Tensor> ragged_attention(
    const at::Tensor& query, const std::optional<at::Tensor>& key, const std::optional<at::Tensor>& value,
    const std::optional<at::Tensor>& other_out, const std::optional<at::Tensor>& other_lse,
    const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& length, const at::Tensor& key_rows,
    const at::Tensor& value_rows, const at::Tensor& row_start, const at::Tensor& row_len, double scale);

/// Raises what the contract says; called first by every body.
void check_ragged_attention(const at::Tensor& query, const std::optional<at::Tensor>& key,
                            const std::optional<at::Tensor>& value, const std::optional<at::Tensor>& other_out,
                            const std::optional<at::Tensor>& other_lse, const std::optional<at::Tensor>& first,
                            const std::optional<at::Tensor>& length, const at::Tensor& key_rows,
                            const at::Tensor& value_rows, const at::Tensor& row_start, const at::Tensor& row_len,
                            double scale);

}  // namespace uncomp
