// SPDX-License-Identifier: Apache-2.0
// Contract of decode_attention.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "ops/key_transform.h"

namespace uncomp {

/// Attention of one query token over the live slots of its cache rows.
///
/// query       [B, Hq, 1, Dk]  rotated; any strides with Dk contiguous
/// key_rows    [C, Dk]         contiguous, dtype of query, 16-byte aligned
/// value_rows  [C, Dv]         likewise; Dv may differ from Dk
/// row_start   [R + 1] int32   slots, ascending
/// row_len     [R]     int32   live tokens; slots behind them may hold anything, NaN included
/// scale                       factor of the logits
/// key_basis and what follows: ops/key_transform.h. With key_basis the width of key_rows is r, that of query D.
///
/// Row r belongs to sequence r / rows, rows = R / B; its g = Hq / rows query heads are (r % rows) * g and the next.
///
/// Returns  out [B, Hq, 1, Dv] in the dtype of query; lse [B, Hq] float32, natural log. A row without tokens gives
///          0 and -inf. A NaN in a live key or in the query gives NaN for its heads, in a live value for its channel;
///          an infinite logit leaves the head it belongs to unspecified. No other head is affected.
/// Raises   TypeError            query not float32, float16 or bfloat16; another dtype in key_rows or value_rows;
///                               row_start or row_len not int32
///          ValueError           a wrong shape, mixed devices, rows that are not contiguous or not on 16-byte borders,
///                               a scale that is not finite in float32; on CPU a row outside the arena or longer than
///                               its room
///          NotImplementedError  a head dim that is not a multiple of 8 or above 256, more than 16 heads for a row;
///                               on CUDA with key_basis also r or D not a multiple of 16, r above 128
///          On CUDA lengths are clamped into the row's room and starts into the arena.
/// Cost     reads every live slot once: live tokens * (Dk + Dv) elements; no host sync; bitwise repeatable.
/// Source   docs/method.md "Decode"; truth: tests/python/reference/decode_attention.py.
std::tuple<at::Tensor, at::Tensor> decode_attention(
    const at::Tensor& query, const at::Tensor& key_rows, const at::Tensor& value_rows, const at::Tensor& row_start,
    const at::Tensor& row_len, double scale, const std::optional<at::Tensor>& key_basis = std::nullopt,
    const std::optional<at::Tensor>& key_bias = std::nullopt, const std::optional<at::Tensor>& key_norm = std::nullopt,
    double key_norm_eps = 0.0, const std::optional<at::Tensor>& rotary_frequency = std::nullopt,
    double rotary_scale = 1.0, const std::optional<at::Tensor>& slot_position = std::nullopt,
    const std::optional<at::Tensor>& position_offset = std::nullopt);

/// Raises what the contract says; called first by every body.
void check_decode_attention(const at::Tensor& query, const at::Tensor& key_rows, const at::Tensor& value_rows,
                            const at::Tensor& row_start, const at::Tensor& row_len, double scale,
                            const KeyTransform& transform);

}  // namespace uncomp
